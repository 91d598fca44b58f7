"""Jobs that fail in llama.cpp itself: the engine's context is smaller than the engine believes."""

from services.inferer.engine.context import EngineMemory
from services.inferer.engine.engine import Engine
from shared.wire.requests import InferenceRequest

N_CTX, ROOM = 8192, 256
TOO_LONG = InferenceRequest(
    task="complete", prompt="tell me", max_tokens=400, temperature=0, seed=1
)


class CrampedEngine(Engine):
    """Replies up to 256 tokens; at the next one llama.cpp's decode finds no room, and says so."""

    def _create_memory(self, slots: int) -> EngineMemory:
        self._options = self._options._replace(n_ctx=ROOM)
        return super()._create_memory(slots)
