/* DHCP (RFC 2131, options of RFC 2132): the guest's address, asked for once.
 *
 * Who answers is QEMU or passt, on the host; neither takes an address back, so the lease is not renewed. */
#ifndef VMETTE_DHCP_H
#define VMETTE_DHCP_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

enum dhcp_type { DHCP_DISCOVER = 1, DHCP_OFFER = 2, DHCP_REQUEST = 3, DHCP_ACK = 5, DHCP_NAK = 6 };

enum { MAX_DNS = 3 }; /* as many as a C library asks (resolv.conf(5), MAXNS) */

/* Addresses in network byte order. */
struct lease {
    struct in_addr address, netmask;
    struct in_addr router; /* 0.0.0.0: none */
    struct in_addr dns[MAX_DNS];
    size_t dns_count;
    unsigned mtu; /* 0: the device's own */
    struct in_addr server;
};

/* Reads an Ethernet frame of `size` bytes. Returns the type of the message (OFFER, ACK or NAK) if it is an answer to
 * transaction `xid` of the device `mac` that can be used, else 0. All but a NAK fill the lease. */
enum dhcp_type dhcp_parse(const unsigned char *frame, size_t size, uint32_t xid, const unsigned char mac[6],
                          struct lease *lease);

/* Gets a lease over `fd`, which takes and gives Ethernet frames. Returns 0, or -1 with errno: ETIMEDOUT when there was no
 * answer for five seconds. */
int dhcp_obtain(int fd, const unsigned char mac[6], struct lease *lease);

#endif
