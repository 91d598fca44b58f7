"""The inferer: one process, one model, one job at a time through each slot."""

import os

# Between two calls of llama.cpp the threads of libgomp wait spinning, 18 ms unless it is told
# otherwise, and take a core each from the broker and the gateway that the answer is on its way
# to. This is about 0.6 ms, as long as the pause between two tokens. It is read when llama.cpp is
# loaded, so it must be set before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
