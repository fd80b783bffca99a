#include "script.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

struct script script;

void script_read(const uint8_t *data, size_t size) {
    size_t count = size < SCRIPT_PREFIX ? 0 : (size_t)(data[0] | data[1] << 8);
    const size_t prefix = size < SCRIPT_PREFIX ? size : SCRIPT_PREFIX;
    if (count > size - prefix) count = size - prefix;
    script.choices = data + prefix;
    script.choices_left = count;
    script.bytes = data + prefix + count;
    script.size = size - prefix - count;
}

bool undecided(void) { return script.choices_left > 0; }

uint8_t choose(void) {
    if (!undecided()) return 0;
    script.choices_left--;
    return *script.choices++;
}

int refuse(const int *errors, size_t count, int result) {
    const uint8_t choice = choose();
    if (choice == 0 || choice > count) return result;
    errno = errors[choice - 1];
    return -1;
}

void complain(const char *what) {
    fprintf(stderr, "==fuzz== %s\n", what);
    abort();
}

#ifdef FUZZ_SELF_TEST
void planted(bool reached) {
    volatile char *byte = malloc(1);
    byte[reached] = 0; /* one past its end */
    free((void *)byte);
}
#endif
