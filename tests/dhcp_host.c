/* The guest's DHCP client for tests: its socket, which takes and gives Ethernet frames, is stdin.
 *
 *   obtain        gets a lease and prints it; or prints errno and ends with 1
 *   parse XID     prints what each frame says
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dhcp.h"

static const unsigned char mac[6] = {0x52, 0x54, 0, 0x12, 0x34, 0x56};

static void print(const struct lease *lease) {
    printf(" %s", inet_ntoa(lease->address));
    printf(" %s", inet_ntoa(lease->netmask));
    printf(" %s", inet_ntoa(lease->router));
    printf(" %s", inet_ntoa(lease->server));
    printf(" %u", lease->mtu);
    for (size_t i = 0; i < lease->dns_count; i++) printf(" %s", inet_ntoa(lease->dns[i]));
}

static int parse(uint32_t xid) {
    ssize_t n;
    unsigned char whole[2048];
    while ((n = read(STDIN_FILENO, whole, sizeof whole)) > 0) {
        struct lease lease;
        unsigned char *frame = malloc((size_t)n); /* just as large as it is: a byte too far is found out */
        if (frame == NULL) return 1;
        memcpy(frame, whole, (size_t)n);
        enum dhcp_type type = dhcp_parse(frame, (size_t)n, xid, mac, &lease);
        free(frame);
        printf("%d", type);
        if (type == DHCP_OFFER || type == DHCP_ACK) print(&lease);
        puts("");
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    struct lease lease;
    if (argc == 3 && strcmp(argv[1], "parse") == 0) return parse((uint32_t)strtoul(argv[2], NULL, 10));
    if (dhcp_obtain(STDIN_FILENO, mac, &lease) != 0) {
        printf("%d\n", errno);
        return 1;
    }
    print(&lease);
    puts("");
    return 0;
}
