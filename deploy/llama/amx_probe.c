/* Exit status 0 if code that this compiler makes for `ldtilecfg` has all 64 bytes in memory.
 *
 * It runs on CPUs without AMX, too: an assembler macro takes the instruction's place and copies what
 * the instruction would have read.
 */
#include <immintrin.h>
#include <string.h>

#include "amx.h"

unsigned char probe_seen[64];
unsigned long probe_rax, probe_rcx;

struct tile_config {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
};

static const struct tile_config wanted = {
    1, 0, {0}, {64, 64, 32, 32, 64, 64, 64, 48}, {8, 8, 16, 16, 16, 16, 16, 4},
};

static void __attribute__((noinline)) load(void) {
    /* No register is changed, and the stack is left alone: the operand may be relative to it. */
    __asm__ volatile(
        ".macro ldtilecfg operand:vararg\n"
        "    movq %rax, probe_rax(%rip)\n"
        "    movq %rcx, probe_rcx(%rip)\n"
        "    leaq \\operand, %rax\n"
        "    .irp offset, 0, 8, 16, 24, 32, 40, 48, 56\n"
        "        movq \\offset(%rax), %rcx\n"
        "        movq %rcx, probe_seen + \\offset(%rip)\n"
        "    .endr\n"
        "    movq probe_rax(%rip), %rax\n"
        "    movq probe_rcx(%rip), %rcx\n"
        ".endm\n");
    struct tile_config config __attribute__((aligned(64))) = {0};
    config.palette = 1;
    config.rows[0] = 8, config.row_bytes[0] = 64;
    config.rows[1] = 8, config.row_bytes[1] = 64;
    config.rows[2] = 16, config.row_bytes[2] = 32;
    config.rows[3] = 16, config.row_bytes[3] = 32;
    config.rows[4] = 16, config.row_bytes[4] = 64;
    config.rows[5] = 16, config.row_bytes[5] = 64;
    config.rows[6] = 16, config.row_bytes[6] = 64;
    config.rows[7] = 4, config.row_bytes[7] = 48;
    _tile_loadconfig(&config);
}

int main(void) {
    load();
    return memcmp(probe_seen, &wanted, sizeof wanted) != 0;
}
