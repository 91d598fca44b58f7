// The Vercel AI SDK, through either of its providers: like the programs in Python, see harness.py.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [json, ...names] = process.argv.slice(2);
const served = JSON.parse(json);
const MAX_TOKENS = 200;
const QUESTION = "Say hello to my cat.";
const ABOUT_A_PERSON = "A person called Ada, 36 years old.";
const ABOUT_THE_WEATHER = "What is the weather in Oslo?";
const TEXTS = ["a cat", "a dog", "rain in the north"];
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
let called;

const openai = createOpenAI({ baseURL: served.url, apiKey: "unused" });
const sluice = createOpenAICompatible({
  name: "sluice",
  baseURL: served.url,
  supportsStructuredOutputs: true,
});

function ask(model, prompt) {
  const models = { chat: openai.chat, responses: openai, compatible: sluice.chatModel };
  return { model: models[served.api](model), prompt, temperature: 0, maxOutputTokens: MAX_TOKENS };
}

const getWeather = tool({
  description: "The weather in a city, now.",
  inputSchema: z.object({ city: z.enum(["Oslo", "Bergen"]) }),
  execute: ({ city }) => {
    called.push(city);
    return `rain in ${city}`;
  },
});

const cases = {
  async plain() {
    const { text } = await generateText(ask(served.model, QUESTION));
    return text;
  },

  async stream() {
    const parts = [];
    const answer = streamText(ask(served.model, QUESTION));
    for await (const part of answer.textStream) parts.push(part);
    return parts;
  },

  async structured() {
    const output = Output.object({ schema: Person });
    const answer = await generateText({ ...ask(served.model, ABOUT_A_PERSON), output });
    return { type: "Person", value: answer.output };
  },

  async tools() {
    const answer = streamText({
      ...ask(served.caller, ABOUT_THE_WEATHER),
      tools: { get_weather: getWeather },
      stopWhen: stepCountIs(5),
    });
    return answer.text;
  },

  async embeddings() {
    const model = (served.api === "chat" ? openai : sluice).textEmbeddingModel(served.embedder);
    const answer = await embedMany({ model, values: TEXTS });
    return answer.embeddings;
  },
};

const outcomes = {};
for (const name of names) {
  called = [];
  try {
    outcomes[name] = { got: await cases[name](), called };
  } catch (error) {
    outcomes[name] = { error: String(error.stack) };
  }
}
console.log(JSON.stringify(outcomes));
