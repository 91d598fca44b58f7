"""A llama.cpp that dies of a real signal: a library that stands in front of the real one.

Inferers load it when ``LLAMA_CPP_LIB_PATH`` names its folder. What it does not define
itself comes from the real library.
"""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import llama_cpp

POISON = "strychnine"
"""A prompt with this word dies of SIGSEGV when it is computed, with `POISONED`."""
HANG = "quagmire"
"""A prompt with this word hangs where it is computed, with `DYING_AND_HANGING`."""
ABORTING = "belladonna"
"""One with this word dies of SIGABRT at its second token, with `POISONED`, as llama.cpp does where
it asserts."""
EXITING = "hemlock"
"""One with this word ends the process with exit status 3, with `POISONED`."""
TOKENIZER_POISON = "poisoned tokenizer"
"""A text with these words dies of SIGSEGV when it is tokenized, with `POISONED`."""

PRELUDE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

typedef struct llama_batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} llama_batch;

/* The function of the real library that this one hides. */
static void *real(const char *name) { return dlsym(dlopen(REAL_LIBRARY, RTLD_NOW), name); }

static void die(int signal_number) {
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static bool dying;
static void die_next(void) { dying = true; }

static void hang(void) { for (;;) pause(); }
"""

DIES_AT_DECODE = r"""
int32_t llama_decode(void *context, llama_batch batch) { die(SIGSEGV); return 0; }
"""
"""A library that cannot compute anything at all."""


def _traps(at_words: dict[str, str], at_texts: dict[str, str]) -> str:
    """C that does something when it computes one of the words, each of which comes after a space;
    and when it tokenizes one of the texts. A word has several tokens, or an answer that happens to
    have it would spring the trap, too."""
    count = len(at_words)
    words = ", ".join(f'" {word}"' for word in at_words)
    springs = "\n".join(f"    if (word == {n}) {do};" for n, do in enumerate(at_words.values()))
    texts = "\n".join(
        f'    if (memmem(text, length, "{text}", {len(text)})) {do};'
        for text, do in at_texts.items()
    )
    return rf"""
static const char *words[] = {{ {words} }};
static int32_t markers[{count}][8], sizes[{count}];

static void spring(int word) {{
{springs}
}}

typedef int32_t tokenize(const void *, const char *, int32_t, int32_t *, int32_t, bool, bool);

int32_t llama_tokenize(
    const void *vocabulary, const char *text, int32_t length,
    int32_t *tokens, int32_t most, bool add_special, bool parse_special
) {{
    tokenize *really = (tokenize *) real("llama_tokenize");
{texts}
    for (int word = 0; word < {count}; word++)
        if (!sizes[word])
            sizes[word] = really(
                vocabulary, words[word], strlen(words[word]), markers[word], 8, false, false);
    for (int word = 0; word < {count}; word++)
        if (sizes[word] < 3)
            _exit(99);
    return really(vocabulary, text, length, tokens, most, add_special, parse_special);
}}

int32_t llama_decode(void *context, llama_batch batch) {{
    if (dying)
        die(SIGABRT);
    for (int word = 0; word < {count}; word++)
        for (int at = 0; sizes[word] > 0 && batch.token && at + sizes[word] <= batch.n_tokens; at++)
            if (!memcmp(batch.token + at, markers[word], sizes[word] * sizeof(int32_t)))
                spring(word);
    return ((int32_t (*)(void *, llama_batch)) real("llama_decode"))(context, batch);
}}
"""


POISONED = _traps(
    {
        POISON: "die(SIGSEGV)",
        ABORTING: "die_next()",
        EXITING: "_exit(3)",
    },
    {TOKENIZER_POISON: "die(SIGSEGV)"},
)
"""A library that computes everything but what holds one of these words (after a space) or
`TOKENIZER_POISON`."""

HANGING = _traps({POISON: "hang()"}, {TOKENIZER_POISON: "hang()"})
"""A library that hangs where `POISONED` dies."""

DYING_AND_HANGING = _traps({POISON: "die(SIGSEGV)", HANG: "hang()"}, {})
"""A library that dies of the one word and hangs at the other."""


HANGS_AT_DECODE = r"""
#include <unistd.h>
int32_t llama_decode(void *context, llama_batch batch) { for (;;) sleep(1); }
"""
"""A library whose first computation never ends."""

SLOW_AT_DECODE = r"""
int32_t llama_decode(void *context, llama_batch batch) {
    sleep(2);
    return ((int32_t (*)(void *, llama_batch)) real("llama_decode"))(context, batch);
}
"""
"""A library that computes three batches within the time limit of a self-test."""

DIES_AT_LOAD = r"""
void *llama_model_load_from_file(const char *path) {
    die(SIGILL);
    return 0;
}
"""
"""A library that was compiled for another CPU."""


def only_with_extra_buffers(what: str) -> str:
    """A library that does ``what``, a statement in C, at each computation, unless the model was
    loaded without extra buffers."""
    parameters = llama_cpp.llama_model_params
    return rf"""
#include <unistd.h>

static bool extra_buffers;

typedef struct {{ char bytes[{ctypes.sizeof(parameters)}]; }} model_parameters;
typedef void *load(const char *, model_parameters);
typedef int32_t decode(void *, llama_batch);

void *llama_model_load_from_file(const char *path, model_parameters parameters) {{
    if (!parameters.bytes[{parameters.no_alloc.offset}])
        extra_buffers = parameters.bytes[{parameters.use_extra_bufts.offset}];
    return ((load *) real("llama_model_load_from_file"))(path, parameters);
}}

int32_t llama_decode(void *context, llama_batch batch) {{
    if (extra_buffers) {{ {what} }}
    return ((decode *) real("llama_decode"))(context, batch);
}}
"""


def write_shim(folder: Path, source: str) -> Path:
    """Compile ``source``, C that may use what `PRELUDE` has, into a ``libllama.so`` in ``folder``;
    the folder, for ``LLAMA_CPP_LIB_PATH``."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = _libraries()
    for library in libraries.glob("*.so*"):
        if library.name != "libllama.so":
            (folder / library.name).symlink_to(library)
    # By the name that it calls itself: a copy under another name would be loaded beside it.
    real = libraries / "libllama.so.0"
    code = folder / "shim.c"
    code.write_text(PRELUDE + source)
    command = ["cc", "-shared", "-fPIC", "-O1", f'-DREAL_LIBRARY="{real}"', str(code)]
    linking = [
        "-Wl,--no-as-needed",
        str(real),
        f"-Wl,-rpath,{libraries}",
        "-ldl",
        "-o",
        str(folder / "libllama.so"),
    ]
    subprocess.run([*command, *linking], check=True)
    return folder


def _libraries() -> Path:
    """Where llama-cpp-python keeps what it compiled; found without loading it."""
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "lib"
