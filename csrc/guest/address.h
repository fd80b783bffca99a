/* Addresses of connections as text (ADDRESS of docs/protocol.md), and sockets for them. */
#ifndef VMETTE_ADDRESS_H
#define VMETTE_ADDRESS_H

#include <stddef.h>
#include <sys/socket.h>

enum { MAX_ADDRESS = 256 };

struct address {
    struct sockaddr_storage socket;
    socklen_t length;
};

/* Parses `length` bytes of text. Returns 0 or an errno: EINVAL, or ENAMETOOLONG. */
int parse_address(struct address *a, const unsigned char *text, size_t length);

/* The text of an address, of at most `size` bytes with its NUL. */
void format_address(const struct address *a, char *text, size_t size);

/* A non-blocking socket that has begun to connect: errno is 0 if it has, EINPROGRESS if that will show. -1 with errno. */
int open_connection(const struct address *a);

/* A non-blocking socket that listens; -1 with errno. */
int open_listener(const struct address *a);

/* Takes a connection, non-blocking too, and tells its peer; -1 with errno. */
int accept_connection(int listener, struct address *peer);

/* Closes a connection so that the peer sees a reset where there is such a thing. */
void reset_connection(int fd);

#endif
