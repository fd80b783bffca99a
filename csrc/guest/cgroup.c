#define _GNU_SOURCE
#include "cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/openat2.h>

enum { FREEZE_STEPS = 1000, FREEZE_STEP_MS = 2, DEATH_STEPS = 100, DEATH_STEP_MS = 2 };

void cgroups_open(struct cgroups *g) {
    g->parent = open(CGROUP_PARENT, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    g->left_count = 0;
    g->due = g->frozen = false;
}

void cgroups_close(struct cgroups *g) {
    if (g->parent >= 0) close(g->parent);
    g->parent = -1;
}

/* The guest's root may mount something over a file there: a pipe, on which one would wait for ever, or what lies. */
static int open_file(const struct cgroups *g, const char *path, int flags) {
    const struct open_how how = {.flags = (uint64_t)(flags | O_NONBLOCK | O_CLOEXEC),
                                 .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV};
    return g->parent < 0 ? -1 : (int)syscall(SYS_openat2, g->parent, path, &how, sizeof how);
}

/* Reads a small file as text. */
static bool read_file(const struct cgroups *g, const char *path, char *text, size_t size) {
    int fd = open_file(g, path, O_RDONLY);
    if (fd < 0) return false;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    if (n <= 0) return false;
    text[n] = 0;
    return true;
}

/* Writes a character to a file. */
static bool write_file(const struct cgroups *g, const char *path, const char *value) {
    int fd = open_file(g, path, O_WRONLY);
    if (fd < 0) return false;
    bool written = write(fd, value, 1) == 1;
    close(fd);
    return written;
}

/* A file of the cgroup of command `id`. */
struct path {
    char text[64];
};

static struct path path_of(uint32_t id, const char *file) {
    struct path path;
    snprintf(path.text, sizeof path.text, "%u/%s", id, file);
    return path;
}

int cgroup_make(const struct cgroups *g, uint32_t id) {
    char name[16];
    snprintf(name, sizeof name, "%u", id);
    /* It is there if the number was used before and processes were left: they are the same command's to the host. */
    if (mkdirat(g->parent, name, 0755) != 0 && errno != EEXIST) return -1;
    return open_file(g, path_of(id, ".").text, O_RDONLY | O_DIRECTORY);
}

bool cgroup_kill(const struct cgroups *g, uint32_t id) { return write_file(g, path_of(id, "cgroup.kill").text, "1"); }

bool cgroup_peak(const struct cgroups *g, uint32_t id, uint64_t *bytes) {
    char text[32];
    if (!read_file(g, path_of(id, "memory.peak").text, text, sizeof text)) return false;
    *bytes = strtoull(text, NULL, 10);
    return true;
}

bool cgroup_oom_kills(const struct cgroups *g, uint32_t id, uint32_t *count) {
    char text[512], *found;
    if (!read_file(g, path_of(id, "memory.events").text, text, sizeof text)) return false;
    if ((found = strstr(text, "oom_kill ")) == NULL) return false;
    *count = (uint32_t)strtoul(found + strlen("oom_kill "), NULL, 10);
    return true;
}

/* --- All of them ----------------------------------------------------------------------------------------------------- */

/* Whether the parent's cgroup.events say so. */
static bool says(const struct cgroups *g, const char *line) {
    char text[256];
    return read_file(g, "cgroup.events", text, sizeof text) && strstr(text, line) != NULL;
}

void cgroups_freeze(struct cgroups *g) {
    const struct timespec step = {.tv_nsec = FREEZE_STEP_MS * 1000000};
    if (!says(g, "populated 1") || !write_file(g, "cgroup.freeze", "1")) return;
    g->frozen = true;
    for (int left = FREEZE_STEPS; left > 0 && !says(g, "frozen 1"); left--) nanosleep(&step, NULL);
}

void cgroups_thaw(struct cgroups *g) {
    if (g->frozen) write_file(g, "cgroup.freeze", "0");
    g->frozen = false;
}

/* --- Their ends ------------------------------------------------------------------------------------------------------ */

/* Whether it is gone. */
static bool try_remove(const struct cgroups *g, uint32_t id) {
    char name[16];
    snprintf(name, sizeof name, "%u", id);
    return unlinkat(g->parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT;
}

void cgroup_await_death(const struct cgroups *g, uint32_t id) {
    const struct timespec step = {.tv_nsec = DEATH_STEP_MS * 1000000};
    for (int left = DEATH_STEPS; left > 0 && g->parent >= 0 && !try_remove(g, id); left--) nanosleep(&step, NULL);
}

void cgroup_remove(struct cgroups *g, uint32_t id) {
    const size_t most = sizeof g->left / sizeof *g->left;
    if (g->parent < 0) return;
    if (g->left_count == most) cgroups_sweep(g);
    if (g->left_count == most) /* too many to remember: the oldest stays, empty or not, until the machine ends */
        memmove(g->left, g->left + 1, --g->left_count * sizeof *g->left);
    g->left[g->left_count++] = id;
    g->due = true;
}

void cgroups_sweep(struct cgroups *g) {
    size_t kept = 0;
    for (size_t i = 0; i < g->left_count; i++)
        if (!try_remove(g, g->left[i])) g->left[kept++] = g->left[i];
    g->left_count = kept;
    g->due = false;
}
