"""The inferer: one process, one model, one job at a time through each slot."""

import os

# Between two calls of llama.cpp the threads of libgomp wait spinning, 18 ms unless this is set,
# and take a core each from the broker and the gateway that the answer is on its way
# to. This is about 0.6 ms, as long as the pause between two tokens. It is read when llama.cpp is
# loaded, so it must be set before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# When llama.cpp aborts, it attaches gdb to itself, if there is one, which takes seconds: the death
# would be noticed so much later. Its own last words, and where we were in Python, are logged.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
