/* The guest's DHCP client reads a frame (csrc/guest/dhcp.c): what it takes of one can be put in force. */
#include <arpa/inet.h>

#include "dhcp.h"
#include "script.h"

static bool is_host(struct in_addr address) {
    uint32_t first = ntohl(address.s_addr) >> 24;
    return first != 0 && first != 127 && first < 224;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const unsigned char mac[6] = {0x52, 0x54, 0, 0x12, 0x34, 0x56};
    const uint32_t xid = 0x01020304;
    struct lease lease;
    enum dhcp_type type = dhcp_parse(data, size, xid, mac, &lease);
    if (type == 0 || type == DHCP_NAK) return 0;
    if (type != DHCP_OFFER && type != DHCP_ACK) complain("something else than an answer is taken for one");
    const uint32_t zeros = ~ntohl(lease.netmask.s_addr);
    if (!is_host(lease.address) || lease.server.s_addr == 0) complain("an address that no host has");
    if (lease.router.s_addr != 0 && !is_host(lease.router)) complain("a router's address that no host has");
    if (lease.netmask.s_addr == 0 || (zeros & (zeros + 1)) != 0) complain("a netmask that is none");
    if (lease.dns_count > MAX_DNS) complain("more name servers than there is room for");
    if (lease.mtu != 0 && (lease.mtu < 576 || lease.mtu > 65535)) complain("an MTU that is none");
    planted(type == DHCP_ACK && lease.mtu == 0);
    return 0;
}
