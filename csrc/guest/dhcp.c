#define _GNU_SOURCE
#include "dhcp.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum {
    PATIENCE = 5000, /* milliseconds for all */
    FIRST_PAUSE = 250, /* until it asks again, then twice that and so on: a frame can get lost */
    LONGEST_PAUSE = 2000,

    ETHERNET = 14,
    IP = 20,
    UDP = 8,
    BOOTP = 236, /* its fixed fields (RFC 2131, 2); then come the cookie and the options */
    COOKIE = 4,
    SMALLEST = 300, /* of a BOOTP message (RFC 1542, 2.1) */
    LARGEST = 1514,

    ETHERTYPE_IPV4 = 0x0800,
    SERVER_PORT = 67,
    CLIENT_PORT = 68,
    REQUEST = 1,
    REPLY = 2,
    ETHER = 1, /* htype */
    BROADCAST = 0x8000,

    OPTION_PAD = 0,
    OPTION_NETMASK = 1,
    OPTION_ROUTER = 3,
    OPTION_DNS = 6,
    OPTION_MTU = 26,
    OPTION_ADDRESS = 50,
    OPTION_TYPE = 53,
    OPTION_SERVER = 54,
    OPTION_WANTED = 55,
    OPTION_END = 255,

    SMALLEST_MTU = 576 /* what every host must take (RFC 791, 3.1) */
};

static const unsigned char cookie[COOKIE] = {99, 130, 83, 99};

static unsigned get16(const unsigned char *p) { return (unsigned)p[0] << 8 | p[1]; }
static void put16(unsigned char *p, unsigned value) {
    p[0] = (unsigned char)(value >> 8);
    p[1] = (unsigned char)value;
}

/* --- Answers -------------------------------------------------------------------------------------------------------- */

/* An address that a host on a network can have. */
static bool is_host(struct in_addr address) {
    uint32_t first = ntohl(address.s_addr) >> 24;
    return first != 0 && first != 127 && first < 224;
}

/* Ones, then zeros. */
static bool is_netmask(struct in_addr netmask) {
    uint32_t zeros = ~ntohl(netmask.s_addr);
    return netmask.s_addr != 0 && (zeros & (zeros + 1)) == 0;
}

static bool take_address(const unsigned char *data, size_t size, struct in_addr *address) {
    if (size < sizeof *address) return false;
    memcpy(address, data, sizeof *address);
    return true;
}

/* One option: false if it is malformed. Those that were not asked for are passed over. */
static bool take_option(unsigned char code, const unsigned char *data, size_t size, unsigned *type, struct lease *lease) {
    switch (code) {
        case OPTION_TYPE:
            if (size != 1) return false;
            *type = data[0];
            return true;
        case OPTION_NETMASK:
            return take_address(data, size, &lease->netmask) && is_netmask(lease->netmask);
        case OPTION_ROUTER: /* the first of them is the best one */
            return take_address(data, size, &lease->router);
        case OPTION_SERVER:
            return take_address(data, size, &lease->server);
        case OPTION_DNS:
            for (lease->dns_count = 0; size >= 4 && lease->dns_count < MAX_DNS; data += 4, size -= 4)
                take_address(data, size, &lease->dns[lease->dns_count++]);
            return true;
        case OPTION_MTU:
            if (size != 2) return false;
            lease->mtu = get16(data) < SMALLEST_MTU ? 0 : get16(data);
            return true;
        default:
            return true;
    }
}

/* The DHCP message in an Ethernet frame: NULL, or where it is and how long. Checksums are not looked at: between two
 * programs of one computer nobody computes them. */
static const unsigned char *find_message(const unsigned char *frame, size_t *size) {
    if (*size < ETHERNET + IP || get16(frame + 12) != ETHERTYPE_IPV4) return NULL;
    const unsigned char *ip = frame + ETHERNET;
    size_t header = (size_t)(ip[0] & 15) * 4, total = get16(ip + 2);
    bool fragment = (get16(ip + 6) & 0x3fff) != 0;
    if (ip[0] >> 4 != 4 || header < IP || fragment || ip[9] != IPPROTO_UDP) return NULL;
    if (total > *size - ETHERNET || total < header + UDP) return NULL;
    const unsigned char *udp = ip + header;
    size_t length = get16(udp + 4);
    if (get16(udp) != SERVER_PORT || get16(udp + 2) != CLIENT_PORT || length > total - header) return NULL;
    if (length < UDP + BOOTP + COOKIE) return NULL;
    *size = length - UDP;
    return udp + UDP;
}

enum dhcp_type dhcp_parse(const unsigned char *frame, size_t size, uint32_t xid, const unsigned char mac[6],
                          struct lease *lease) {
    const unsigned char *message = find_message(frame, &size);
    if (message == NULL || message[0] != REPLY || message[1] != ETHER || message[2] != 6) return 0;
    if (memcmp(message + 4, &xid, sizeof xid) != 0 || memcmp(message + 28, mac, 6) != 0) return 0;
    if (memcmp(message + BOOTP, cookie, COOKIE) != 0) return 0;
    unsigned type = 0;
    memset(lease, 0, sizeof *lease);
    memcpy(&lease->address, message + 16, sizeof lease->address);
    const unsigned char *p = message + BOOTP + COOKIE, *end = message + size;
    while (p < end && *p != OPTION_END) {
        unsigned char code = *p++;
        if (code == OPTION_PAD) continue;
        if (p == end || *p > end - p - 1) return 0;
        unsigned char length = *p++;
        if (!take_option(code, p, length, &type, lease)) return 0;
        p += length;
    }
    if (type == DHCP_NAK) return DHCP_NAK;
    bool usable = is_host(lease->address) && lease->netmask.s_addr != 0 && lease->server.s_addr != 0 &&
                  (lease->router.s_addr == 0 || is_host(lease->router));
    return usable && (type == DHCP_OFFER || type == DHCP_ACK) ? (enum dhcp_type)type : 0;
}

/* --- Questions ------------------------------------------------------------------------------------------------------ */

static unsigned char *add_option(unsigned char *p, unsigned char code, const void *data, size_t size) {
    *p++ = code;
    *p++ = (unsigned char)size;
    memcpy(p, data, size);
    return p + size;
}

/* The sum of an IP header (RFC 791, 3.1). */
static unsigned checksum(const unsigned char *p, size_t size) {
    uint32_t sum = 0;
    for (size_t i = 0; i < size; i += 2) sum += get16(p + i);
    while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
    return ~sum & 0xffff;
}

/* A broadcast frame with a DISCOVER; or with a REQUEST, if there is an offer. Returns its size. */
static size_t make_question(unsigned char frame[LARGEST], uint32_t xid, const unsigned char mac[6],
                            const struct lease *offer) {
    memset(frame, 0, LARGEST);
    unsigned char *ip = frame + ETHERNET, *udp = ip + IP, *message = udp + UDP;
    message[0] = REQUEST;
    message[1] = ETHER;
    message[2] = 6;
    memcpy(message + 4, &xid, sizeof xid);
    put16(message + 10, BROADCAST); /* the answer is to go to all, as no address is ours yet */
    memcpy(message + 28, mac, 6);
    memcpy(message + BOOTP, cookie, COOKIE);
    unsigned char *p = message + BOOTP + COOKIE;
    static const unsigned char wanted[] = {OPTION_NETMASK, OPTION_ROUTER, OPTION_DNS, OPTION_MTU};
    unsigned char type = offer == NULL ? DHCP_DISCOVER : DHCP_REQUEST;
    p = add_option(p, OPTION_TYPE, &type, 1);
    p = add_option(p, OPTION_WANTED, wanted, sizeof wanted);
    if (offer != NULL) {
        p = add_option(p, OPTION_ADDRESS, &offer->address, sizeof offer->address);
        p = add_option(p, OPTION_SERVER, &offer->server, sizeof offer->server);
    }
    *p++ = OPTION_END;
    size_t size = (size_t)(p - message);
    if (size < SMALLEST) size = SMALLEST;

    put16(udp, CLIENT_PORT);
    put16(udp + 2, SERVER_PORT);
    put16(udp + 4, (unsigned)(UDP + size)); /* and a checksum of 0, which is none */
    ip[0] = 4 << 4 | IP / 4;
    put16(ip + 2, (unsigned)(IP + UDP + size));
    ip[8] = 64; /* hops it may live */
    ip[9] = IPPROTO_UDP;
    memset(ip + 16, 0xff, 4); /* from 0.0.0.0 to 255.255.255.255 */
    put16(ip + 10, checksum(ip, IP));
    memset(frame, 0xff, 6);
    memcpy(frame + 6, mac, 6);
    put16(frame + 12, ETHERTYPE_IPV4);
    return ETHERNET + IP + UDP + size;
}

/* --- The exchange --------------------------------------------------------------------------------------------------- */

static int64_t milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int dhcp_obtain(int fd, const unsigned char mac[6], struct lease *lease) {
    unsigned char frame[LARGEST];
    uint32_t xid = 0;
    /* Only to tell answers apart: that the kernel may not have gathered randomness yet does not matter. */
    if (getrandom(&xid, sizeof xid, GRND_INSECURE) < 0) return -1;
    struct lease offer, got;
    bool offered = false;
    int64_t end = milliseconds() + PATIENCE, again = 0, pause = FIRST_PAUSE;
    for (;;) {
        int64_t now = milliseconds();
        if (now >= end) {
            errno = ETIMEDOUT;
            return -1;
        }
        if (now >= again) {
            size_t size = make_question(frame, xid, mac, offered ? &offer : NULL);
            (void)!write(fd, frame, size); /* one that is not sent is one that gets lost */
            again = now + pause;
            pause = pause * 2 < LONGEST_PAUSE ? pause * 2 : LONGEST_PAUSE;
        }
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, (int)((again < end ? again : end) - now)) <= 0) continue;
        ssize_t n = read(fd, frame, sizeof frame);
        if (n < 0 && errno != EINTR && errno != EAGAIN && errno != ENETDOWN) return -1;
        enum dhcp_type type = n <= 0 ? 0 : dhcp_parse(frame, (size_t)n, xid, mac, &got);
        if (type == (offered ? DHCP_NAK : DHCP_OFFER)) {
            offered = !offered;
            offer = got;
            again = 0;
            pause = FIRST_PAUSE;
        } else if (offered && type == DHCP_ACK && got.server.s_addr == offer.server.s_addr) {
            *lease = got;
            return 0;
        }
    }
}
