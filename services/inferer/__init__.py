"""The inferer: one process, one model, one job at a time through each slot."""

import os

# If llama.cpp was compiled with OpenMP (Sluice's recipe does without), its threads busy-wait
# between two calls, 18 ms unless this is set. Each of them takes a core from the broker and the
# gateway, which deliver the answer. This is about 0.6 ms. It is read when llama.cpp is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# When llama.cpp aborts, it attaches gdb to itself, if installed, which takes seconds: the crash
# would be noticed that much later. Its last output and the Python traceback are logged anyway.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
