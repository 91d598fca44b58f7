"""The HTTP edge: everything that knows Litestar or uvicorn."""
