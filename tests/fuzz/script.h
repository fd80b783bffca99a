/* The inputs of fuzz_agent and fuzz_untar: what is parsed, and how the world around the parser behaves meanwhile.
 *
 * An input is a u16 (little-endian), that many bytes of choices, and the bytes to parse. A choice says what the next
 * call of the kernel does: fail, or give a part of what was asked for. When none are left every choice is 0, with which
 * calls succeed and all comes to its end; so each run ends. Bytes without a structure would not get far: the mutator
 * (mutator.c) keeps the two parts apart, and changes, doubles and drops whole units (frames, blocks) of the second.
 */
#ifndef VMETTE_FUZZ_SCRIPT_H
#define VMETTE_FUZZ_SCRIPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SCRIPT_PREFIX = 2 };

extern struct script {
    const uint8_t *choices, *bytes;
    size_t choices_left, size;
} script;

void script_read(const uint8_t *data, size_t size);
uint8_t choose(void);
bool undecided(void); /* whether there are choices left */

/* One of the errors, as -1 with errno, or `result`, as the next choice says: 0, and what is above them, is no error. */
int refuse(const int *errors, size_t count, int result);
#define REFUSE(result, ...) refuse((const int[]){__VA_ARGS__}, sizeof((const int[]){__VA_ARGS__}) / sizeof(int), result)

/* The target's own version of a call of the guest's, for the linker's --wrap. */
#define WRAP(type, name, ...) \
    type __real_##name(__VA_ARGS__); \
    type __wrap_##name(__VA_ARGS__)

/* What a target says of its units: how long the first one of `size` bytes is, at most that; and how one of `size` bytes
 * that was changed becomes sound again. There is room for any header; it returns the new size. */
size_t unit_length(const uint8_t *bytes, size_t size);
size_t unit_repair(uint8_t *unit, size_t size);

/* Ends the run: the parser did what it must not. */
_Noreturn void complain(const char *what);

/* A fault where the fuzzer has to find its way to: tests/test_fuzz.py sees that it is found and told. */
#ifdef FUZZ_SELF_TEST
void planted(bool reached);
#else
static inline void planted(bool reached) { (void)reached; }
#endif

#endif
