/* PID 1 of a guest that is not ours: writes what /say holds to the control port, again and again if there is /endless,
 * and then does nothing, or ends if there is /end. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static int open_port(void) {
    for (int number = 0;; number = (number + 1) % 8) {
        char path[64], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/vport0p%d/name", number);
        int file = open(path, O_RDONLY);
        if (file >= 0 && read(file, name, sizeof name - 1) > 0 && strncmp(name, "vmette.control", 14) == 0) {
            snprintf(path, sizeof path, "/dev/vport0p%d", number);
            return open(path, O_RDWR);
        }
        close(file);
        usleep(1000);
    }
}

int main(void) {
    static char said[1 << 20];
    mkdir("/sys", 0755);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int file = open("/say", O_RDONLY), port = open_port();
    ssize_t size = read(file, said, sizeof said);
    do
        for (ssize_t done = 0, n; done < size; done += n)
            if ((n = write(port, said + done, (size_t)(size - done))) <= 0) return 1;
    while (access("/endless", F_OK) == 0);
    while (access("/end", F_OK) != 0) pause();
    return 0;
}
