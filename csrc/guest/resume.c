#define _GNU_SOURCE
#include "resume.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <linux/random.h>

enum { MAX_SEED = 256 };

int open_own(const char *path) {
    struct stat st;
    if (mkdir("/etc", 0755) != 0 && (errno != EEXIST || lstat("/etc", &st) != 0)) return -1;
    if (lstat("/etc", &st) != 0 || !S_ISDIR(st.st_mode)) {
        errno = ENOTDIR;
        return -1;
    }
    if (lstat(path, &st) == 0 && !S_ISREG(st.st_mode)) unlink(path);
    return open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
}

int name_machine(const char *hostname) {
    if (sethostname(hostname, strlen(hostname)) != 0) return errno;
    int fd = open_own("/etc/hosts");
    if (fd < 0) return errno == ENOTDIR || errno == EROFS ? 0 : errno;
    dprintf(fd, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname);
    close(fd);
    return 0;
}

static bool is_named(const char *hostname) {
    char name[HOST_NAME_MAX + 1];
    return gethostname(name, sizeof name) == 0 && strcmp(name, hostname) == 0;
}

/* Two machines that were woken from one would draw the same numbers otherwise. The kernel takes the seed for what it is
 * worth, all of it, and has its generators use it at once. */
static int reseed(int random, const unsigned char *seed, size_t size) {
    struct {
        int bits, bytes;
        unsigned char data[MAX_SEED];
    } pool; /* a struct rand_pool_info of <linux/random.h>, with room for its data */
    if (size > sizeof pool.data) return EINVAL;
    pool.bits = (int)size * 8;
    pool.bytes = (int)size;
    memcpy(pool.data, seed, size);
    int result = ioctl(random, RNDADDENTROPY, &pool) != 0 || ioctl(random, RNDRESEEDCRNG) != 0 ? errno : 0;
    explicit_bzero(&pool, sizeof pool);
    return result;
}

static const char machine_id[] = "/etc/machine-id";

void expect_resume(void) {
    struct stat st;
    (void)!lstat(machine_id, &st);
}

/* Where the root has a machine's identity (machine-id(5)), it is another one now. */
static int identify_machine(void) {
    unsigned char bytes[16];
    char text[2 * sizeof bytes + 2];
    struct stat st;
    if (lstat(machine_id, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size < (off_t)(2 * sizeof bytes)) return 0;
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes) return errno;
    bytes[6] = (bytes[6] & 0x0f) | 0x40; /* a UUID of version 4, as systemd makes it */
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    for (size_t i = 0; i < sizeof bytes; i++) snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    text[2 * sizeof bytes] = '\n';
    int fd = open_own(machine_id);
    if (fd < 0) return errno == ENOTDIR || errno == EROFS ? 0 : errno;
    bool written = write(fd, text, 2 * sizeof bytes + 1) == (ssize_t)(2 * sizeof bytes + 1);
    int error = written ? 0 : errno;
    close(fd);
    return error;
}

int resume_machine(const struct resume *resume, int random, const char **stage) {
    const struct timespec clock = {(time_t)(resume->clock / 1000000000), (long)(resume->clock % 1000000000)};
    int error = reseed(random, resume->seed, resume->seed_size);
    *stage = "entropy";
    if (error != 0) return error;
    *stage = "clock";
    if (resume->clock != 0 && clock_settime(CLOCK_REALTIME, &clock) != 0) return errno;
    *stage = "hostname";
    if (resume->hostname != NULL && !is_named(resume->hostname) && (error = name_machine(resume->hostname)) != 0)
        return error;
    *stage = "machine-id";
    return identify_machine();
}
