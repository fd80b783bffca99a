#define _GNU_SOURCE
#include "address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "wire.h"

enum { BACKLOG = 128 };

/* --- Text ----------------------------------------------------------------------------------------------------------- */

/* Cuts `text` at its last colon and returns what is after it; NULL if there is none. */
static char *cut_port(char *text) {
    char *colon = strrchr(text, ':');
    if (colon == NULL) return NULL;
    *colon = 0;
    return colon + 1;
}

static bool parse_tcp(struct address *a, char *text) {
    uint32_t port;
    char *digits = cut_port(text);
    if (digits == NULL || !parse_number(digits, UINT16_MAX, &port)) return false;
    size_t length = strlen(text);
    if (length > 2 && text[0] == '[' && text[length - 1] == ']') {
        struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&a->socket;
        text[length - 1] = 0;
        in6->sin6_family = AF_INET6;
        in6->sin6_port = htons((uint16_t)port);
        a->length = sizeof *in6;
        return inet_pton(AF_INET6, text + 1, &in6->sin6_addr) == 1;
    }
    struct sockaddr_in *in = (struct sockaddr_in *)&a->socket;
    in->sin_family = AF_INET;
    in->sin_port = htons((uint16_t)port);
    a->length = sizeof *in;
    return inet_pton(AF_INET, text, &in->sin_addr) == 1;
}

/* The CID 4294967295, also written `any`, is for listeners. */
static bool parse_vsock(struct address *a, char *text) {
    struct sockaddr_vm *vm = (struct sockaddr_vm *)&a->socket;
    char *digits = cut_port(text);
    vm->svm_family = AF_VSOCK;
    vm->svm_cid = VMADDR_CID_ANY;
    a->length = sizeof *vm;
    return digits != NULL && parse_number(digits, UINT32_MAX, &vm->svm_port) &&
           (strcmp(text, "any") == 0 || parse_number(text, UINT32_MAX, &vm->svm_cid));
}

static int parse_unix(struct address *a, const char *path) {
    struct sockaddr_un *un = (struct sockaddr_un *)&a->socket;
    size_t length = strlen(path);
    if (*path != '/') return EINVAL;
    if (length >= sizeof un->sun_path) return ENAMETOOLONG;
    un->sun_family = AF_UNIX;
    memcpy(un->sun_path, path, length + 1);
    a->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    return 0;
}

int parse_address(struct address *a, const unsigned char *data, size_t length) {
    char text[MAX_ADDRESS];
    if (length >= sizeof text) return ENAMETOOLONG;
    memcpy(text, data, length);
    text[length] = 0;
    memset(a, 0, sizeof *a);
    if (strlen(text) != length) return EINVAL;
    if (strncmp(text, "unix:", 5) == 0) return parse_unix(a, text + 5);
    if (strncmp(text, "tcp:", 4) == 0 && parse_tcp(a, text + 4)) return 0;
    if (strncmp(text, "vsock:", 6) == 0 && parse_vsock(a, text + 6)) return 0;
    return EINVAL;
}

void format_address(const struct address *a, char *text, size_t size) {
    char host[INET6_ADDRSTRLEN] = "";
    const struct sockaddr_in *in = (const struct sockaddr_in *)&a->socket;
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)&a->socket;
    const struct sockaddr_vm *vm = (const struct sockaddr_vm *)&a->socket;
    const struct sockaddr_un *un = (const struct sockaddr_un *)&a->socket;
    const size_t path = offsetof(struct sockaddr_un, sun_path);
    switch (a->socket.ss_family) {
        case AF_INET:
            inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
            snprintf(text, size, "tcp:%s:%u", host, ntohs(in->sin_port));
            break;
        case AF_INET6:
            inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
            snprintf(text, size, "tcp:[%s]:%u", host, ntohs(in6->sin6_port));
            break;
        case AF_VSOCK:
            snprintf(text, size, "vsock:%u:%u", vm->svm_cid, vm->svm_port);
            break;
        default: /* a peer on a unix socket has no name, as a rule, and its path need not end with NUL */
            snprintf(text, size, "unix:%.*s", (int)(a->length > path ? a->length - path : 0), un->sun_path);
    }
}

/* --- Sockets -------------------------------------------------------------------------------------------------------- */

static int open_socket(const struct address *a) {
    return socket(a->socket.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

static void set_option(int fd, int level, int option) {
    (void)setsockopt(fd, level, option, &(int){1}, sizeof(int));
}

static int close_failed(int fd) {
    int error = errno;
    if (fd >= 0) close(fd);
    errno = error;
    return -1;
}

/* What is relayed has been gathered already: Nagle's algorithm would only hold it up. Other families refuse that. */
static void hurry(int fd) { set_option(fd, IPPROTO_TCP, TCP_NODELAY); }

int open_connection(const struct address *a) {
    int fd = open_socket(a);
    if (fd < 0) return -1;
    hurry(fd);
    errno = 0;
    if (connect(fd, (const struct sockaddr *)&a->socket, a->length) == 0)
        errno = 0;
    else if (errno != EINPROGRESS)
        return close_failed(fd);
    return fd;
}

int open_listener(const struct address *a) {
    int fd = open_socket(a);
    if (fd < 0) return -1;
    if (a->socket.ss_family != AF_UNIX) set_option(fd, SOL_SOCKET, SO_REUSEADDR);
    if (a->socket.ss_family == AF_INET6) set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY); /* [::] does not take 0.0.0.0 too */
    /* Whoever can reach a unix socket's path may connect, as with the other families. */
    mode_t mask = umask(0111);
    int result = bind(fd, (const struct sockaddr *)&a->socket, a->length);
    umask(mask);
    if (result != 0 || listen(fd, BACKLOG) != 0) return close_failed(fd);
    return fd;
}

int accept_connection(int listener, struct address *peer) {
    memset(peer, 0, sizeof *peer);
    peer->length = sizeof peer->socket;
    int fd = accept4(listener, (struct sockaddr *)&peer->socket, &peer->length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) hurry(fd);
    return fd;
}

void reset_connection(int fd) {
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
    close(fd);
}
