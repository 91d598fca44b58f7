# How llama.cpp is compiled for Sluice, on a developer's machine and in images alike. CMake reads
# this file after each project() when it is given as CMAKE_PROJECT_INCLUDE; wheel.py does that.
# What the command line says with -D wins. docs/compiling.md says what each choice gives.

# OpenMP's threads wait for each other far longer than llama.cpp's own, which matters most with AMX.
set(GGML_OPENMP OFF CACHE BOOL "")

# Sluice uses libllama alone. Images, audio and the helpers of llama.cpp's programs are more than
# half of the time it takes to compile everything.
set(LLAVA_BUILD OFF CACHE BOOL "")
set(LLAMA_BUILD_COMMON OFF) # llama-cpp-python forces it into the cache; a plain variable hides that

string(REGEX MATCH "x86_64|AMD64" is_x86 "${CMAKE_SYSTEM_PROCESSOR}")

# What is not for this CPU (the images) is for every CPU: code for each kind, of which the best is
# chosen when the inferer starts. On Arm it takes GCC 14, which the images do not have.
if(is_x86 AND DEFINED GGML_NATIVE AND NOT GGML_NATIVE)
    set(GGML_BACKEND_DL ON CACHE BOOL "")
    set(GGML_CPU_ALL_VARIANTS ${GGML_BACKEND_DL} CACHE BOOL "")
endif()

# What is loaded at the start lies beside the library.
if(GGML_BACKEND_DL)
    set(CMAKE_INSTALL_BINDIR "llama_cpp/lib")
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()

if(PROJECT_IS_TOP_LEVEL AND is_x86 AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(amx_header "${CMAKE_CURRENT_LIST_DIR}/amx.h")
    try_run(amx_exit_status amx_compiles
        "${CMAKE_BINARY_DIR}/amx-probe" "${CMAKE_CURRENT_LIST_DIR}/amx_probe.c"
        COMPILE_DEFINITIONS -O3 -mamx-tile)
    add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:SHELL:-include \"${amx_header}\">")
    if(amx_compiles AND amx_exit_status EQUAL 0)
        message(STATUS "Sluice: this compiler can do AMX")
    else()
        message(STATUS "Sluice: this compiler cannot do AMX; it is left out")
        add_compile_definitions(SLUICE_WITHOUT_AMX)
    endif()
endif()
