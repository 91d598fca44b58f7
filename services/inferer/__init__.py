"""The inferer: one process, one model, one job at a time through each slot."""

import os

# Between two calls of llama.cpp the threads of libgomp busy-wait, 18 ms unless this is set. Each of
# them takes a core from the broker and the gateway, which deliver the answer. This is about 0.6 ms,
# as long as the pause between two tokens. It is read when llama.cpp is loaded, so it is set before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# When llama.cpp aborts, it attaches gdb to itself, if installed, which takes seconds: the crash
# would be noticed that much later. Its last output and the Python traceback are logged anyway.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
