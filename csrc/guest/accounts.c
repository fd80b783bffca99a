#define _GNU_SOURCE
#include "accounts.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "wire.h"

enum { FIELDS = 7 };

/* The lines of a file. There is no allocation in it: stdio's is much of what a command's start would take in a machine
 * that has just woken. */
static struct {
    int fd;
    size_t start, end; /* of what was read and not yet handed out */
    bool skips;        /* within a line that is longer than there is room */
    char text[65536];
} lines;

static bool open_lines(const char *path) {
    lines.fd = open(path, O_RDONLY | O_CLOEXEC);
    lines.start = lines.end = 0;
    lines.skips = false;
    return lines.fd >= 0;
}

static void close_lines(void) { close(lines.fd); }

/* The next line, to be changed as one likes; NULL at the end. One that is too long is left out. */
static char *next_line(void) {
    for (;;) {
        char *line = lines.text + lines.start, *end = memchr(line, '\n', lines.end - lines.start);
        if (end != NULL) {
            *end = 0;
            lines.start = (size_t)(end + 1 - lines.text);
            if (!lines.skips) return line;
            lines.skips = false;
            continue;
        }
        lines.end -= lines.start;
        memmove(lines.text, line, lines.end);
        lines.start = 0;
        if (lines.end == sizeof lines.text - 1) {
            lines.skips = true;
            lines.end = 0;
        }
        ssize_t n;
        do n = read(lines.fd, lines.text + lines.end, sizeof lines.text - 1 - lines.end);
        while (n < 0 && errno == EINTR);
        if (n > 0) {
            lines.end += (size_t)n;
            continue;
        }
        if (lines.end == 0 || lines.skips) return NULL;
        lines.text[lines.end] = 0; /* the last one, which does not end */
        lines.end = 0;
        return lines.text;
    }
}

/* Splits a line at its colons; returns how many fields there are, FIELDS at most. */
static size_t split(char *line, char *fields[FIELDS]) {
    size_t count = 0;
    while (count < FIELDS && line != NULL) fields[count++] = strsep(&line, ":");
    return count;
}

/* The largest number would mean to setuid and its kin: leave it as it is. */
static bool parse_id(const char *text, uint32_t *id) { return parse_number(text, UINT32_MAX - 1, id); }

bool find_user(const char *name, uint32_t uid, struct user *user) {
    char *line, *fields[FIELDS];
    bool found = false;
    if (!open_lines("/etc/passwd")) return false;
    while (!found && (line = next_line()) != NULL) {
        if (split(line, fields) < FIELDS || !parse_id(fields[2], &user->uid) || !parse_id(fields[3], &user->gid)) continue;
        if (strlen(fields[0]) >= sizeof user->name) continue;
        found = name != NULL ? strcmp(fields[0], name) == 0 : user->uid == uid;
        if (!found) continue;
        strcpy(user->name, fields[0]);
        strcpy(user->home, *fields[5] != 0 && strlen(fields[5]) < sizeof user->home ? fields[5] : "/");
    }
    close_lines();
    return found;
}

/* The next group's fields, and its number; false at the end. */
static bool next_group(char *fields[FIELDS], gid_t *gid) {
    char *line;
    while ((line = next_line()) != NULL)
        if (split(line, fields) >= 4 && parse_id(fields[2], gid)) return true;
    return false;
}

bool find_group(const char *name, gid_t *gid) {
    char *fields[FIELDS];
    bool found = false;
    if (!open_lines("/etc/group")) return false;
    while (!found && next_group(fields, gid)) found = strcmp(fields[0], name) == 0;
    close_lines();
    return found;
}

static bool has_member(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ",")) != NULL;)
        if (strcmp(member, name) == 0) return true;
    return false;
}

size_t find_memberships(const char *name, gid_t *groups, size_t count, size_t most) {
    char *fields[FIELDS];
    gid_t gid;
    if (!open_lines("/etc/group")) return count;
    while (count < most && next_group(fields, &gid))
        if (gid != *groups && has_member(fields[3], name)) groups[count++] = gid;
    close_lines();
    return count;
}
