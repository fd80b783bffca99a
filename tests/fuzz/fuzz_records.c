/* The parsers of what frames carry: EXEC (parse_exec), other records (next_field), addresses (parse_address).
 *
 * The first byte of an input says which; the rest is parsed.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "address.h"
#include "builtins.h"
#include "command.h"
#include "script.h"
#include "wire.h"

int builtin_run(char **argv) {
    (void)argv;
    complain("a child runs");
}

static size_t count(char *const *list, size_t *bytes) {
    size_t found = 0;
    for (; list[found] != NULL; found++) *bytes += strlen(list[found]) + 1;
    return found;
}

static void exec(const uint8_t *data, size_t size) {
    struct command c;
    size_t bytes = 0;
    void *block = parse_exec(data, size, &c);
    if (block == NULL) {
        if (errno != EPROTO) complain("EXEC is refused for no reason");
        return;
    }
    size_t args = count(c.argv, &bytes), entries = count(c.env, &bytes);
    if (c.cwd != NULL) bytes += strlen(c.cwd) + 1;
    if (c.user != NULL) bytes += strlen(c.user) + 1;
    if (args == 0) complain("a command without a program");
    if (bytes + (args + entries) * (FIELD - 1) > size) complain("the strings are longer than EXEC");
    planted(args == 2 && entries == 1 && c.cwd != NULL);
    c.env[entries + 3] = NULL; /* there is room for three more, and the end */
    free(block);
}

static void record(const uint8_t *data, size_t size) {
    const unsigned char *p = data, *value;
    size_t left = size, length, seen = 0;
    uint32_t tag;
    int more;
    while ((more = next_field(&p, &left, &tag, &value, &length)) > 0) {
        for (size_t i = 0; i < length; i++) (void)!((const volatile unsigned char *)value)[i];
        seen += FIELD + length;
    }
    if ((more == 0) != (seen == size)) complain("a record does not end where it ends");
}

/* What is an address can be told, and is the same then. */
static void address(const uint8_t *data, size_t size) {
    struct address a, again;
    char text[MAX_ADDRESS];
    int error = parse_address(&a, data, size);
    if (error != 0) {
        if (error != EINVAL && error != ENAMETOOLONG) complain("an address is refused for no reason");
        return;
    }
    if (a.length > sizeof a.socket) complain("an address is too long");
    format_address(&a, text, sizeof text);
    if (parse_address(&again, (const unsigned char *)text, strlen(text)) != 0) complain("an address is told wrongly");
    if (memcmp(&a, &again, sizeof a) != 0) complain("an address is another one when it is told");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const parsers[])(const uint8_t *, size_t) = {exec, record, address};
    if (size > 0) parsers[data[0] % 3](data + 1, size - 1);
    return 0;
}
