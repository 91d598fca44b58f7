# llama.cpp's own server with Sluice's recipe: the same compiler flags as the library of the inferer.
# Only the recipe leaves out what the server needs besides the library.
include("${CMAKE_CURRENT_LIST_DIR}/../../deploy/llama/recipe.cmake")
set(LLAMA_BUILD_COMMON ON)
