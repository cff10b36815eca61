/*
 * Spends one kind of kernel memory, holds it, and prints "KIND UNITS ERRNO": how many objects there
 * were, and why there were no more (0: enough).
 *
 *     kernel_memory KIND PROCESSES BYTES HOLD_MS
 *
 * PROCESSES of them share the work, until the objects are BYTES in all, by the size that each kind
 * states, or until the kernel refuses. All of it is held for HOLD_MS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

enum { KIB = 1024, FILTER_LENGTH = 2000 /* within Linux 6.1's net.core.optmem_max */ };

static char junk[256 * KIB];
static int number; /* of this process */
static int null_fd;

static void nonblocking(int fd) { fcntl(fd, F_SETFL, O_NONBLOCK); }

/* Each makes one object and returns a negative number if it could not. */

static long netlink_errors(long n)
{
	static int fd = -1;
	int size = 8 * KIB * KIB;
	struct { struct nlmsghdr header; char rest[15000]; } message = {
		.header = {.nlmsg_len = sizeof message, .nlmsg_type = 4000, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
	};
	if (n % 16 == 0) {
		fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, 0);
		if (fd < 0)
			return -1;
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
	}
	return send(fd, &message, sizeof message, 0);
}

static long netlink_dumps(long n)
{
	struct { struct nlmsghdr header; char family[16]; } message = {
		.header = {.nlmsg_len = sizeof message, .nlmsg_type = 18, .nlmsg_flags = NLM_F_REQUEST | 0x300},
	};
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_NONBLOCK, 0);
	(void)n;
	return fd < 0 ? -1 : send(fd, &message, sizeof message, 0);
}

static struct sock_fprog *long_filter(void)
{
	static struct sock_filter code[FILTER_LENGTH];
	static struct sock_fprog program = {FILTER_LENGTH, code};
	for (int i = 0; i < FILTER_LENGTH; i++)
		code[i] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_IMM, (unsigned)i);
	code[FILTER_LENGTH - 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, 0x7fff0000);
	return &program;
}

static long socket_filters(long n)
{
	int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	(void)n;
	return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, long_filter(), sizeof(struct sock_fprog));
}

static long reuseport_filters(long n)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), one = 1;
	(void)n;
	setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
	return setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, long_filter(), sizeof(struct sock_fprog));
}

static long seccomp_filters(long n)
{
	(void)n;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, long_filter());
}

static long seccomp_prctl(long n)
{
	(void)n;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, long_filter());
}

static long inotify_instances(long n) { (void)n; return inotify_init1(0); }

static long inotify_watches(long n)
{
	static int fd = -1;
	char name[32];
	if (n == 0)
		fd = inotify_init1(0);
	snprintf(name, sizeof name, "w%d-%ld", number, n);
	if (mkdir(name, 0700) < 0)
		return -1;
	return inotify_add_watch(fd, name, IN_ALL_EVENTS);
}

static long fanotify_groups(long n) { (void)n; return syscall(SYS_fanotify_init, 0x200, 0); }

static long epoll_instances(long n) { (void)n; return epoll_create1(0); }

static long epoll_watches(long n)
{
	/* Each pair of an instance and a descriptor is a watch. */
	static int epolls[100], targets[100];
	struct epoll_event event = {.events = EPOLLIN};
	if (n == 0)
		for (int i = 0; i < 100; i++) {
			epolls[i] = epoll_create1(0);
			targets[i] = eventfd(0, 0);
		}
	if (n >= 10000)
		return -1;
	return epoll_ctl(epolls[n / 100], EPOLL_CTL_ADD, targets[n % 100], &event);
}

static long eventfds(long n) { (void)n; return eventfd(0, 0); }
static long timerfds(long n) { (void)n; return timerfd_create(CLOCK_MONOTONIC, 0); }

static long signalfds(long n)
{
	sigset_t set;
	(void)n;
	sigemptyset(&set);
	return signalfd(-1, &set, 0);
}

static long pidfds(long n) { (void)n; return syscall(SYS_pidfd_open, getpid(), 0); }

static long pipe_pages(long n)
{
	static int ends[2];
	if (n % 16 == 0) {
		if (pipe(ends) < 0)
			return -1;
		nonblocking(ends[1]);
	}
	return write(ends[1], junk, 4096);
}

static long pipe_rings(long n)
{
	int ends[2];
	(void)n;
	if (pipe(ends) < 0)
		return -1;
	return fcntl(ends[1], F_SETPIPE_SZ, 1024 * 1024);
}

static long unix_buffers(long n, int type)
{
	static int ends[2];
	if (n % 8 == 0) {
		if (socketpair(AF_UNIX, type, 0, ends) < 0)
			return -1;
		nonblocking(ends[1]);
	}
	return send(ends[1], junk, 16 * KIB, 0);
}

static long unix_streams(long n) { return unix_buffers(n, SOCK_STREAM); }
static long unix_datagrams(long n) { return unix_buffers(n, SOCK_DGRAM); }

static long unix_tiny_datagrams(long n)
{
	static int ends[2];
	if (n % 8 == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) < 0)
		return -1;
	nonblocking(ends[1]);
	return send(ends[1], junk, 1, 0);
}

static long descriptors_in_flight(long n)
{
	static int ends[2];
	enum { EACH = 250 };
	int fds[EACH];
	union { char bytes[CMSG_SPACE(sizeof fds)]; struct cmsghdr align; } control;
	struct iovec part = {"x", 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
	if (n % 8 == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) < 0)
		return -1;
	nonblocking(ends[1]);
	for (int i = 0; i < EACH; i++)
		fds[i] = null_fd;
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fds);
	memcpy(CMSG_DATA(header), fds, sizeof fds);
	return sendmsg(ends[1], &message, 0);
}

static struct sockaddr_in loopback(void)
{
	return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static long udp_buffers(long n)
{
	static int to, from = -1;
	static struct sockaddr_in address;
	socklen_t size = sizeof address;
	int buffer = 4 << 20;
	if (from < 0)
		from = socket(AF_INET, SOCK_DGRAM, 0);
	if (n % 256 == 0) {
		to = socket(AF_INET, SOCK_DGRAM, 0);
		setsockopt(to, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
		address = loopback();
		if (bind(to, (struct sockaddr *)&address, size) < 0 || getsockname(to, (struct sockaddr *)&address, &size) < 0)
			return -1;
	}
	return sendto(from, junk, 16 * KIB, MSG_DONTWAIT, (struct sockaddr *)&address, size);
}

static long tcp_connection(int ends[2])
{
	static int listener = -1;
	static struct sockaddr_in address;
	socklen_t size = sizeof address;
	if (listener < 0) {
		listener = socket(AF_INET, SOCK_STREAM, 0);
		address = loopback();
		if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 8) < 0 ||
		    getsockname(listener, (struct sockaddr *)&address, &size) < 0)
			return -1;
	}
	ends[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (ends[0] < 0 || connect(ends[0], (struct sockaddr *)&address, size) < 0)
		return -1;
	return ends[1] = accept(listener, NULL, NULL);
}

static long tcp_buffers(long n)
{
	static int ends[2];
	int size = 4 << 20;
	if (n % 128 == 0) {
		if (tcp_connection(ends) < 0)
			return -1;
		setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
		setsockopt(ends[1], SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
		nonblocking(ends[0]);
	}
	return send(ends[0], junk, 16 * KIB, 0);
}

static long tcp_connections(long n)
{
	int ends[2];
	(void)n;
	return tcp_connection(ends);
}

static long tcp_abandoned(long n)
{
	/* Closed with data unread at the other end: what is left has no descriptor. */
	int ends[2], size = 1 << 20;
	(void)n;
	if (tcp_connection(ends) < 0)
		return -1;
	setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
	nonblocking(ends[0]);
	for (int i = 0; i < 16; i++)
		send(ends[0], junk, 16 * KIB, 0);
	close(ends[0]);
	return 0;
}

static long tcp_time_wait(long n)
{
	int ends[2];
	(void)n;
	if (tcp_connection(ends) < 0)
		return -1;
	close(ends[0]);
	close(ends[1]);
	return 0;
}

static long tcp_sockets(long n) { (void)n; return socket(AF_INET6, SOCK_STREAM, 0); }
static long unix_sockets(long n) { (void)n; return socket(AF_UNIX, SOCK_STREAM, 0); }

static long multicast_memberships(long n)
{
	static int fd;
	struct ip_mreqn request = {.imr_multiaddr.s_addr = htonl(0xe1000000u + (unsigned)(number * 100000 + n)), .imr_ifindex = 1};
	if (n % 20 == 0)
		fd = socket(AF_INET, SOCK_DGRAM, 0);
	return setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &request, sizeof request);
}

static long multicast_sources(long n)
{
	static int fd;
	enum { SOURCES = 10 };
	static union { struct ip_msfilter filter; char bytes[IP_MSFILTER_SIZE(SOURCES)]; } all;
	if (n % 20 == 0)
		fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct ip_mreqn request = {.imr_multiaddr.s_addr = htonl(0xe1000000u + (unsigned)(number * 100000 + n)), .imr_ifindex = 1};
	if (setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &request, sizeof request) < 0)
		return -1;
	all.filter.imsf_multiaddr = request.imr_multiaddr;
	all.filter.imsf_interface.s_addr = htonl(INADDR_LOOPBACK);
	all.filter.imsf_fmode = MCAST_INCLUDE;
	all.filter.imsf_numsrc = SOURCES;
	for (unsigned i = 0; i < SOURCES; i++)
		all.filter.imsf_slist[i].s_addr = htonl(0x0a000000u + i);
	return setsockopt(fd, IPPROTO_IP, IP_MSFILTER, &all, sizeof all);
}

static long multicast_memberships6(long n)
{
	static int fd;
	struct ipv6_mreq request = {.ipv6mr_interface = 1};
	request.ipv6mr_multiaddr.s6_addr[0] = 0xff;
	request.ipv6mr_multiaddr.s6_addr[1] = 0x01;
	memcpy(request.ipv6mr_multiaddr.s6_addr + 8, &n, sizeof n);
	request.ipv6mr_multiaddr.s6_addr[4] = (unsigned char)number;
	request.ipv6mr_multiaddr.s6_addr[5] = (unsigned char)(number >> 8);
	if (n % 500 == 0)
		fd = socket(AF_INET6, SOCK_DGRAM, 0);
	return setsockopt(fd, IPPROTO_IPV6, IPV6_JOIN_GROUP, &request, sizeof request);
}

static long timers(long n)
{
	timer_t timer;
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	(void)n;
	return timer_create(CLOCK_MONOTONIC, &event, &timer);
}

static long queued_signals(long n)
{
	sigset_t set;
	if (n == 0) {
		sigfillset(&set);
		sigprocmask(SIG_BLOCK, &set, NULL);
	}
	return sigqueue(getpid(), SIGRTMIN, (union sigval){0});
}

static long zombies(long n)
{
	pid_t child = fork();
	(void)n;
	if (child == 0)
		_exit(0);
	return child;
}

static long page_tables(long n)
{
	/* Each 2 MiB that is touched once has a page of page table. */
	static char *base;
	if (n % 512 == 0)
		base = mmap(NULL, 1UL << 30, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -1;
	madvise(base + (n % 512 << 21), 1UL << 21, MADV_NOHUGEPAGE);
	return *(volatile char *)(base + (n % 512 << 21));
}

static long mappings(long n)
{
	static char *base;
	if (n % 30000 == 0)
		base = mmap(NULL, 60001 * 4096UL, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return mprotect(base + (n % 30000 * 2 + 1) * 4096, 4096, PROT_NONE);
}

static long record_locks(long n)
{
	static int fd;
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = n * 2, .l_len = 1};
	char name[32];
	snprintf(name, sizeof name, "l%d", number);
	if (n == 0)
		fd = open(name, O_RDWR | O_CREAT, 0600);
	return fcntl(fd, F_SETLK, &lock);
}

static long leases(long n)
{
	char name[32];
	snprintf(name, sizeof name, "e%d-%ld", number, n);
	return fcntl(open(name, O_RDONLY | O_CREAT, 0600), F_SETLEASE, F_RDLCK);
}

static long dnotify(long n)
{
	(void)n;
	return fcntl(open("/work", O_RDONLY | O_DIRECTORY), F_NOTIFY, 0x80000001UL | 2);
}

static long shm_segments(long n)
{
	int id = shmget(IPC_PRIVATE, 4096, 0600);
	(void)n;
	if (id < 0)
		return -1;
	*(volatile char *)shmat(id, NULL, 0) = 1;
	return 0;
}

static long semaphores(long n) { (void)n; return semget(IPC_PRIVATE, 32000, 0600); }

static long message_queues(long n)
{
	static int id;
	if (n % 4 == 0)
		id = msgget(IPC_PRIVATE, 0600);
	*(long *)junk = 1;
	return msgsnd(id, junk, 4000, IPC_NOWAIT);
}

static long tiny_messages(long n)
{
	static int id;
	if (n % 16000 == 0)
		id = msgget(IPC_PRIVATE, 0600);
	*(long *)junk = 1;
	return msgsnd(id, junk, 0, IPC_NOWAIT);
}

static long posix_queues(long n)
{
	char name[32];
	snprintf(name, sizeof name, "q%d-%ld", number, n);
	return syscall(SYS_mq_open, name, O_CREAT | O_RDWR, 0600, NULL);
}

static long memory_files(long n)
{
	int fd = memfd_create("x", 0);
	(void)n;
	return write(fd, junk, 16 * KIB);
}

static long empty_files(long n)
{
	char name[64];
	snprintf(name, sizeof name, "f%d-%ld", number, n);
	return mknod(name, S_IFREG | 0600, 0);
}

static long long_links(long n)
{
	char name[64], to[4000];
	memset(to, 'x', sizeof to);
	to[sizeof to - 1] = 0;
	snprintf(name, sizeof name, "k%d-%ld", number, n);
	return symlink(to, name);
}

static long attributes(long n)
{
	static int fd;
	char name[64];
	snprintf(name, sizeof name, "a%d", number);
	if (n == 0)
		fd = open(name, O_RDWR | O_CREAT, 0600);
	snprintf(name, sizeof name, "user.%ld", n);
	return fsetxattr(fd, name, junk, 32 * KIB, 0);
}

static long missing_names(long n, const char *directory)
{
	char name[300];
	struct stat info;
	snprintf(name, sizeof name, "%s/%0200ld-%d", directory, n, number);
	stat(name, &info);
	return errno == ENOENT ? 0 : -1;
}

static long missing_here(long n) { return missing_names(n, "/work"); }
static long missing_in_root(long n) { return missing_names(n, "/usr"); }
static long missing_in_proc(long n) { return missing_names(n, "/proc/self"); }

static long proc_entries(long n)
{
	char name[64];
	struct stat info;
	snprintf(name, sizeof name, "/proc/self/fdinfo/%ld", n % 200);
	dup2(null_fd, (int)(n % 200 + 20));
	stat(name, &info);
	return close((int)(n % 200 + 20));
}

static long keys(long n)
{
	char name[32];
	snprintf(name, sizeof name, "k%d-%ld", number, n);
	return syscall(SYS_add_key, "user", name, junk, 4000, -2);
}

static long aio_contexts(long n)
{
	unsigned long context = 0;
	(void)n;
	return syscall(SYS_io_setup, 64, &context);
}

static long io_rings(long n)
{
	char parameters[120] = {0};
	(void)n;
	return syscall(SYS_io_uring_setup, 4096, parameters);
}

static long bpf_maps(long n)
{
	union bpf_attr attributes = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4096, .max_entries = 16};
	(void)n;
	return syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes);
}

static long perf_events(long n)
{
	struct { unsigned type, size; char rest[112]; } attributes = {.type = 1, .size = 120};
	(void)n;
	return syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0);
}

static long user_namespaces(long n) { (void)n; return unshare(CLONE_NEWUSER); }

static long futex_hashes(long n)
{
	if (n > 0)
		return -1;
	return prctl(78 /* PR_FUTEX_HASH */, 1, 8192, 0);
}

static long sealed_by_landlock(long n)
{
	unsigned long attributes[3] = {1, 0, 0};
	(void)n;
	return syscall(444 /* landlock_create_ruleset */, attributes, 8, 0);
}

/* What a process holds as long as it waits. */

static long waiting_in_poll(long n)
{
	static struct pollfd fds[4096];
	if (n == 1)
		return -1;
	int fd = eventfd(0, 0), count = 4096;
	for (int i = 0; i < count; i++)
		fds[i] = (struct pollfd){.fd = fd, .events = POLLIN};
	struct timespec none = {0, 0};
	while (ppoll(fds, (nfds_t)count, &none, NULL) < 0 && count > 1)
		count /= 2;
	poll(fds, (nfds_t)count, 3000);
	return 0;
}

static long waiting_to_send(long n)
{
	static char control[120 * KIB];
	int ends[2];
	struct iovec parts[1024];
	struct cmsghdr *header = (struct cmsghdr *)control;
	if (n == 1)
		return -1;
	for (int i = 0; i < 1024; i++)
		parts[i] = (struct iovec){junk, 200};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 1024, .msg_control = control, .msg_controllen = sizeof control};
	header->cmsg_len = sizeof control;
	header->cmsg_level = 9999;
	socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
	while (send(ends[1], junk, sizeof junk, MSG_DONTWAIT) > 0)
		;
	alarm(3);
	return sendmsg(ends[1], &message, 0);
}

static const struct kind {
	const char *name;
	long (*make)(long n);
	long size; /* about, of one object, bytes */
} kinds[] = {
	{"netlink_errors", netlink_errors, 17 * KIB},
	{"netlink_dumps", netlink_dumps, 16 * KIB},
	{"socket_filters", socket_filters, 28 * KIB},
	{"reuseport_filters", reuseport_filters, 28 * KIB},
	{"seccomp_filters", seccomp_filters, 28 * KIB},
	{"seccomp_prctl", seccomp_prctl, 28 * KIB},
	{"inotify_instances", inotify_instances, 1 * KIB},
	{"inotify_watches", inotify_watches, 1 * KIB},
	{"fanotify_groups", fanotify_groups, 1 * KIB},
	{"epoll_instances", epoll_instances, 512},
	{"epoll_watches", epoll_watches, 192},
	{"eventfds", eventfds, 512},
	{"timerfds", timerfds, 512},
	{"signalfds", signalfds, 512},
	{"pidfds", pidfds, 256},
	{"pipe_pages", pipe_pages, 4 * KIB},
	{"pipe_rings", pipe_rings, 10 * KIB},
	{"unix_streams", unix_streams, 16 * KIB},
	{"unix_datagrams", unix_datagrams, 16 * KIB},
	{"unix_tiny_datagrams", unix_tiny_datagrams, 768},
	{"descriptors_in_flight", descriptors_in_flight, 3 * KIB},
	{"udp_buffers", udp_buffers, 20 * KIB},
	{"tcp_buffers", tcp_buffers, 20 * KIB},
	{"tcp_connections", tcp_connections, 5 * KIB},
	{"tcp_abandoned", tcp_abandoned, 256 * KIB},
	{"tcp_time_wait", tcp_time_wait, 512},
	{"tcp_sockets", tcp_sockets, 3 * KIB},
	{"unix_sockets", unix_sockets, 2 * KIB},
	{"multicast_memberships", multicast_memberships, 512},
	{"multicast_sources", multicast_sources, 1 * KIB},
	{"multicast_memberships6", multicast_memberships6, 512},
	{"timers", timers, 512},
	{"queued_signals", queued_signals, 80},
	{"zombies", zombies, 12 * KIB},
	{"page_tables", page_tables, 4 * KIB},
	{"mappings", mappings, 400},
	{"record_locks", record_locks, 256},
	{"leases", leases, 1 * KIB},
	{"dnotify", dnotify, 512},
	{"shm_segments", shm_segments, 5 * KIB},
	{"semaphores", semaphores, 2000 * KIB},
	{"message_queues", message_queues, 4 * KIB},
	{"tiny_messages", tiny_messages, 64},
	{"posix_queues", posix_queues, 2 * KIB},
	{"memory_files", memory_files, 17 * KIB},
	{"empty_files", empty_files, 1 * KIB},
	{"long_links", long_links, 5 * KIB},
	{"attributes", attributes, 32 * KIB},
	{"missing_here", missing_here, 512},
	{"missing_in_root", missing_in_root, 512},
	{"missing_in_proc", missing_in_proc, 512},
	{"proc_entries", proc_entries, 1 * KIB},
	{"keys", keys, 4 * KIB},
	{"aio_contexts", aio_contexts, 8 * KIB},
	{"io_rings", io_rings, 256 * KIB},
	{"bpf_maps", bpf_maps, 64 * KIB},
	{"perf_events", perf_events, 2 * KIB},
	{"user_namespaces", user_namespaces, 1 * KIB},
	{"futex_hashes", futex_hashes, 512 * KIB},
	{"landlock_rulesets", sealed_by_landlock, 512},
	{"waiting_in_poll", waiting_in_poll, 300 * KIB},
	{"waiting_to_send", waiting_to_send, 140 * KIB},
	{"nothing", NULL, 1},
};

static void done(int signal) { (void)signal; _exit(0); }

int main(int argc, char **argv)
{
	struct shared { atomic_long units; atomic_int refusal, busy; } *shared;
	const struct kind *kind = kinds;
	long bytes = argc == 5 ? atol(argv[3]) : 0;
	int processes = argc == 5 ? atoi(argv[2]) : 0;

	if (argc == 2 && !strcmp(argv[1], "--list")) {
		for (kind = kinds; kind->make; kind++)
			puts(kind->name);
		return 0;
	}
	while (kind->make && strcmp(kind->name, argv[1]))
		kind++;
	signal(SIGALRM, done);
	signal(SIGIO, SIG_IGN);
	null_fd = open("/dev/null", O_RDWR);
	memset(junk, 'x', sizeof junk);
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (number = 0; kind->make && number < processes; number++) {
		atomic_fetch_add(&shared->busy, 1);
		pid_t child = fork();
		if (child == 0) {
			for (long n = 0; atomic_load(&shared->units) * kind->size < bytes; n++) {
				if (kind->size >= 140 * KIB && kind->name[0] == 'w')
					atomic_fetch_add(&shared->units, 1); /* it does not come back */
				if (kind->make(n) < 0) {
					atomic_store(&shared->refusal, errno);
					break;
				}
				atomic_fetch_add(&shared->units, 1);
			}
			atomic_fetch_sub(&shared->busy, 1);
			for (;;)
				pause();
		}
		if (child < 0) {
			atomic_fetch_sub(&shared->busy, 1);
			break;
		}
		/* One after the other until it is enough: the fewest processes that can do it. */
		for (int i = 0; i < 20 && atomic_load(&shared->busy) > 0 && !(kind->name[0] == 'w'); i++)
			usleep(1000);
		if (atomic_load(&shared->units) * kind->size >= bytes)
			break;
	}
	for (int i = 0; i < 1500 && atomic_load(&shared->busy) > 0; i++)
		usleep(1000);
	usleep((useconds_t)atoi(argv[4]) * 1000);
	printf("%s %ld %d\n", argv[1], atomic_load(&shared->units), atomic_load(&shared->refusal));
	fflush(stdout);
	return 0;
}
