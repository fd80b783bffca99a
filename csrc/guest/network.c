#define _GNU_SOURCE
#include "network.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/route.h>
#include <netpacket/packet.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

static const char card[] = "eth0";

static struct sockaddr inet(struct in_addr address) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = address};
    struct sockaddr result;
    memcpy(&result, &in, sizeof result);
    return result;
}

static struct ifreq about(const char *device) {
    struct ifreq request = {0};
    strncpy(request.ifr_name, device, sizeof request.ifr_name - 1);
    return request;
}

static bool set_flags(int fd, const char *device, short flags) {
    struct ifreq request = about(device);
    request.ifr_flags = flags;
    return ioctl(fd, SIOCSIFFLAGS, &request) == 0;
}

static bool bring_up(int fd, const char *device) { return set_flags(fd, device, IFF_UP | IFF_RUNNING); }

const char *loopback_up(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const char *problem = fd >= 0 && bring_up(fd, "lo") ? NULL : "cannot bring up loopback";
    close(fd);
    return problem;
}

/* Asks over a socket of its own, which sees whole frames: a host without an address gets no others. */
static const char *ask_dhcp(int fd, struct lease *lease) {
    struct ifreq request = about(card);
    if (ioctl(fd, SIOCGIFHWADDR, &request) != 0) return "cannot find the network card's address";
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = (int)if_nametoindex(card)};
    int frames = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (frames < 0 || bind(frames, (struct sockaddr *)&address, sizeof address) != 0)
        return "cannot open the network card";
    int done = dhcp_obtain(frames, (const unsigned char *)request.ifr_hwaddr.sa_data, lease);
    int error = errno;
    close(frames);
    errno = error;
    return done == 0 ? NULL : "no answer to DHCP";
}

/* Reads ADDRESS/LENGTH,ROUTER,DNS; the last two may be missing. */
static bool parse_static(char *text, struct lease *lease) {
    char *router = text, *address = strsep(&router, ","), *dns = router;
    router = strsep(&dns, ",");
    char *length = address, *end;
    address = strsep(&length, "/");
    if (length == NULL || *length < '0' || *length > '9') return false;
    unsigned long bits = strtoul(length, &end, 10);
    if (*end != 0 || bits < 1 || bits > 32) return false;
    lease->netmask.s_addr = htonl(UINT32_MAX << (32 - bits));
    if (dns != NULL && *dns != 0 && inet_pton(AF_INET, dns, &lease->dns[lease->dns_count++]) != 1) return false;
    return inet_pton(AF_INET, address, &lease->address) == 1 &&
           (router == NULL || *router == 0 || inet_pton(AF_INET, router, &lease->router) == 1);
}

static bool add_route(int fd, struct rtentry route) {
    route.rt_dev = (char *)card;
    route.rt_flags |= RTF_UP;
    return ioctl(fd, SIOCADDRT, &route) == 0 || errno == EEXIST;
}

/* The default route. A router outside of the network, as clouds have them, is given a route of its own first. */
static bool route_to(int fd, const struct lease *lease) {
    struct in_addr none = {0}, all = {INADDR_NONE};
    bool outside = ((lease->router.s_addr ^ lease->address.s_addr) & lease->netmask.s_addr) != 0;
    struct rtentry host = {.rt_dst = inet(lease->router), .rt_genmask = inet(all), .rt_flags = RTF_HOST};
    struct rtentry rest = {.rt_dst = inet(none), .rt_genmask = inet(none), .rt_gateway = inet(lease->router)};
    rest.rt_flags = RTF_GATEWAY;
    return (!outside || add_route(fd, host)) && add_route(fd, rest);
}

static const char *configure(int fd, const struct lease *lease) {
    struct ifreq request = about(card);
    request.ifr_addr = inet(lease->address);
    if (ioctl(fd, SIOCSIFADDR, &request) != 0) return "cannot set the network card's address";
    request = about(card);
    request.ifr_netmask = inet(lease->netmask);
    if (ioctl(fd, SIOCSIFNETMASK, &request) != 0) return "cannot set the network card's netmask";
    request = about(card);
    request.ifr_mtu = (int)lease->mtu;
    if (lease->mtu != 0 && ioctl(fd, SIOCSIFMTU, &request) != 0) return "cannot set the network card's MTU";
    if (lease->router.s_addr != 0 && !route_to(fd, lease)) return "cannot set the default route";
    return NULL;
}

const char *network_up(const char *how, struct lease *lease) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || !bring_up(fd, card)) return "cannot bring up the network card";
    memset(lease, 0, sizeof *lease);
    char text[128], *dns = text;
    snprintf(text, sizeof text, "%s", how);
    const char *problem = NULL;
    if (strcmp(strsep(&dns, ","), "dhcp") == 0) {
        problem = ask_dhcp(fd, lease);
        if (problem == NULL && dns != NULL) {
            lease->dns_count = 1;
            if (inet_pton(AF_INET, dns, &lease->dns[0]) != 1) problem = "the name server is no address";
        }
    } else {
        if (dns != NULL) dns[-1] = ','; /* what strsep cut */
        errno = EINVAL;
        if (!parse_static(text, lease)) problem = "vmette.net is malformed: it is dhcp or ADDRESS/LENGTH,ROUTER,DNS";
    }
    if (problem == NULL) problem = configure(fd, lease);
    int error = errno;
    close(fd);
    errno = error;
    return problem;
}

const char *network_again(const char *how, struct lease *lease) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = about(card);
    unsigned char *address = (unsigned char *)request.ifr_hwaddr.sa_data;
    bool done = fd >= 0 && set_flags(fd, card, 0) && ioctl(fd, SIOCGIFHWADDR, &request) == 0 &&
                getrandom(address + 3, 3, 0) == 3 && /* the first half stays: QEMU's, or locally administered */
                ioctl(fd, SIOCSIFHWADDR, &request) == 0;
    int error = errno;
    close(fd);
    errno = error;
    return done ? network_up(how, lease) : "cannot give the network card another address";
}
