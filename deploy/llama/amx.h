/* Included before every file of llama.cpp that GCC compiles (recipe.cmake).
 *
 * `ldtilecfg` reads 64 bytes. Some versions of GCC, 12.2 among them, declare it in <immintrin.h> as
 * reading 8: the compiler then drops the stores to the other 56, which nobody seems to read, and
 * the processor faults on what happens to be there. Here it is declared as it is.
 *
 * With SLUICE_WITHOUT_AMX llama.cpp is to leave AMX out, whatever the CPU has.
 */
#ifndef SLUICE_AMX_H
#define SLUICE_AMX_H

#ifdef SLUICE_WITHOUT_AMX
#undef __AMX_TILE__
#undef __AMX_INT8__
#undef __AMX_BF16__
#elif defined(__AMX_TILE__)
#include <immintrin.h>

struct sluice_tile_config {
    unsigned char bytes[64];
};

static inline __attribute__((always_inline)) void
sluice_load_tile_config(const void * config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const struct sluice_tile_config *) config));
}

#define _tile_loadconfig(config) sluice_load_tile_config(config)
#endif

#endif
