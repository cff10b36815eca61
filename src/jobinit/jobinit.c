/*
 * jobinit: the init (PID 1) of a jail.
 *
 * Why it exists.  Without an init the job itself is PID 1 of its pid namespace, and the kernel
 * ignores default-action signals that PID 1 sends to itself: abort() shows as SIGSEGV, raise(SIGTERM)
 * as nothing.  nsjail then folds "killed by signal S" into the exit code 128+S, which a job can
 * imitate.  jobinit is PID 1, runs the job as its child under another uid, and reports the child's
 * raw wait status over a socket that the job never holds.
 *
 * It is told what to run, so that a jail can stand ready before its job is known.
 *
 * Protocol, over a SOCK_SEQPACKET unix socket (see cellblock/jail.py, its only peer):
 *
 *   jobinit    -> "HELLO" + version    the supervisor reads our host pid from SCM_CREDENTIALS and
 *                                      puts us into the stage's cgroup before it answers
 *   supervisor -> "START"              with four descriptors: a spec (memfd), stdin, stdout, stderr
 *   jobinit    -> "BEGUN"              the program was executed; or
 *                 struct failed        it was not, with the step and errno
 *   supervisor -> "KILL"               any time after START: kill everything, then report
 *   jobinit    -> struct ended         raw wait status of the program, usage of all reaped children;
 *                                      jobinit then stays until the socket is closed
 *
 * Spec: struct spec_header, then `rlimits` struct spec_rlimit, then NUL-terminated strings: working
 * directory, arguments, environment.  All integers are in the machine's own byte order: both ends
 * run on the same host.
 *
 * jobinit runs as uid 0 of the jail's user namespace with just the capabilities named in jail.py;
 * the job gets JOB_ID with no capability in any set.  Exit codes of jobinit itself are diagnostics
 * for the journal and decide nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "seccomp.h"

enum { CONTROL_FD = 3, PROTOCOL_VERSION = 2, JOB_ID = 1000, MAX_RLIMITS = 16, MAX_STRINGS = 65536 };
/* How many route sockets a job has at one time, and how much may lie in the queue of each. */
enum { NETLINK_SOCKETS = 16, NETLINK_QUEUE_BYTES = 212992 };
enum { TAG_FAILED = 0x4c494146, TAG_ENDED = 0x45444e45 }; /* "FAIL", "ENDE" */

enum step {
	STEP_SPEC = 1, STEP_FORK, STEP_DESCRIPTORS, STEP_RLIMIT, STEP_CHDIR, STEP_CREDENTIALS, STEP_EXEC,
	STEP_CONFINE,
};

struct spec_header {
	uint32_t version, argc, envc, rlimits;
};

struct spec_rlimit {
	uint32_t resource, reserved;
	uint64_t soft, hard;
};

struct failed {
	uint32_t tag, step;
	int32_t error;
	uint32_t detail; /* the resource for STEP_RLIMIT */
};

struct ended {
	uint32_t tag;
	int32_t wait_status;
	uint64_t user_us, system_us;         /* the reaped children, all together */
	uint64_t max_rss_kib;                /* the largest single reaped process */
	uint64_t voluntary_switches, involuntary_switches;
	uint64_t blocks_in, blocks_out;      /* 512 byte units */
	uint64_t minor_faults, major_faults;
	uint64_t started_ns, ended_ns;       /* of the program, on CLOCK_MONOTONIC: the supervisor may be late */
};

struct program {
	const char *cwd;
	char **argv, **envp;
	const struct spec_rlimit *rlimits;
	uint32_t rlimit_count;
	int stdio[3];
};

static char *strings[MAX_STRINGS + 2]; /* argv, NULL, envp, NULL */

static void die(int code)
{
	_exit(code);
}

static void report(const void *message, size_t size)
{
	if (send(CONTROL_FD, message, size, MSG_NOSIGNAL) != (ssize_t)size)
		die(102);
}

static void report_failed(int fd, enum step step, int error, uint32_t detail)
{
	struct failed message = {.tag = TAG_FAILED, .step = step, .error = error, .detail = detail};
	ssize_t written = write(fd, &message, sizeof message);
	(void)written; /* the reader sees a short or missing record as an internal error */
}

/* Blocks until START; fills fds with the spec and the job's three standard descriptors. */
static void await_start(int fds[4])
{
	char text[16];
	struct iovec part = {.iov_base = text, .iov_len = sizeof text};
	union {
		char bytes[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
				 .msg_controllen = sizeof control.bytes};
	ssize_t size;

	do
		size = recvmsg(CONTROL_FD, &message, MSG_CMSG_CLOEXEC);
	while (size < 0 && errno == EINTR);
	if (size == 0)
		die(0); /* the supervisor no longer wants this jail */
	struct cmsghdr *header = size == 5 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!header || memcmp(text, "START", 5) || header->cmsg_type != SCM_RIGHTS ||
	    header->cmsg_len != CMSG_LEN(4 * sizeof(int)) || (message.msg_flags & MSG_CTRUNC))
		die(101);
	memcpy(fds, CMSG_DATA(header), 4 * sizeof(int));
}

/* Returns 0, or an errno; `program` then points into a private mapping of the spec. */
static int read_spec(int fd, struct program *program)
{
	struct stat info;
	if (fstat(fd, &info) < 0)
		return errno;
	size_t size = (size_t)info.st_size;
	if (size < sizeof(struct spec_header) + 2)
		return EBADMSG;
	char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	if (base == MAP_FAILED)
		return errno;
	close(fd);

	struct spec_header header;
	memcpy(&header, base, sizeof header);
	size_t text = sizeof header + header.rlimits * sizeof(struct spec_rlimit);
	if (header.version != PROTOCOL_VERSION || header.rlimits > MAX_RLIMITS || header.argc < 1 ||
	    header.argc > MAX_STRINGS || header.envc > MAX_STRINGS - header.argc || text >= size ||
	    base[size - 1] != '\0')
		return EBADMSG;
	program->rlimits = (const struct spec_rlimit *)(base + sizeof header);
	program->rlimit_count = header.rlimits;

	char *cursor = base + text, *end = base + size;
	program->cwd = cursor;
	cursor += strlen(cursor) + 1;
	program->argv = strings;
	program->envp = strings + header.argc + 1;
	for (uint32_t i = 0; i < header.argc + header.envc; i++) {
		if (cursor >= end)
			return EBADMSG;
		strings[i < header.argc ? i : i + 1] = cursor;
		cursor += strlen(cursor) + 1;
	}
	return cursor == end ? 0 : EBADMSG;
}

/* From jail root to the job's id, with no capability in any set.  Returns 0 or an errno. */
static int become_job(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	for (int cap = 0; cap < 64; cap++)
		if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0 && errno != EINVAL)
			return errno;
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return errno;
	if (setgroups(0, NULL) < 0 || setresgid(JOB_ID, JOB_ID, JOB_ID) < 0 ||
	    setresuid(JOB_ID, JOB_ID, JOB_ID) < 0)
		return errno;
	memset(data, 0, sizeof data);
	if (syscall(SYS_capset, &header, data) < 0)
		return errno;
	/* The kernel's word, not ours: anything left is a reason not to run the job. */
	if (syscall(SYS_capget, &header, data) < 0)
		return errno;
	for (int i = 0; i < 2; i++)
		if (data[i].effective | data[i].permitted | data[i].inheritable)
			return EPERM;
	if (getuid() != JOB_ID || geteuid() != JOB_ID || getgid() != JOB_ID || getegid() != JOB_ID ||
	    getgroups(0, NULL) != 0 || prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1)
		return EPERM;
	return 0;
}

/* Loads the filter and sends init its listener.  Returns 0 or an errno. */
static int confine(int init)
{
	char text[] = "LISTENER";
	struct iovec part = {.iov_base = text, .iov_len = sizeof text};
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
				 .msg_controllen = sizeof control.bytes};
	int listener, error = confine_job(&listener);

	if (error || listener < 0)
		return error;
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &listener, sizeof(int));
	if (sendmsg(init, &message, MSG_NOSIGNAL) < 0)
		return errno;
	close(listener);
	return 0;
}

/* In the child.  `errors` is close-on-exec: its end-of-file tells init that the program runs. */
static void run_program(const struct program *program, int errors)
{
	sigset_t none;
	int error;

	setsid();
	/* The three descriptors arrived above CONTROL_FD, so no dup2 overwrites one still needed. */
	for (int i = 0; i < 3; i++)
		if (dup2(program->stdio[i], i) < 0) {
			report_failed(errors, STEP_DESCRIPTORS, errno, 0);
			die(103);
		}
	if (dup3(errors, CONTROL_FD, O_CLOEXEC) < 0 ||
	    syscall(SYS_close_range, CONTROL_FD + 1, ~0U, 0) < 0) {
		report_failed(errors, STEP_DESCRIPTORS, errno, 0);
		die(103);
	}
	errors = CONTROL_FD;
	if ((error = become_job())) {
		report_failed(errors, STEP_CREDENTIALS, error, 0);
		die(103);
	}
	if (chdir(program->cwd) < 0) {
		report_failed(errors, STEP_CHDIR, errno, 0);
		die(103);
	}
	for (uint32_t i = 0; i < program->rlimit_count; i++) {
		const struct spec_rlimit *wanted = &program->rlimits[i];
		struct rlimit limit = {.rlim_cur = wanted->soft, .rlim_max = wanted->hard};
		if (setrlimit((int)wanted->resource, &limit) < 0) {
			report_failed(errors, STEP_RLIMIT, errno, wanted->resource);
			die(103);
		}
	}
	/* Ignored signals would stay ignored across exec. */
	for (int number = 1; number <= SIGRTMAX; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if ((error = confine(errors))) {
		report_failed(errors, STEP_CONFINE, error, 0);
		die(103);
	}
	environ = program->envp; /* execvp searches the job's own PATH */
	execvp(program->argv[0], program->argv);
	report_failed(errors, STEP_EXEC, errno, 0);
	die(103);
}

/* The next message of the child, whose size is returned; `listener` is set if it came with it. */
static ssize_t receive(int socket, void *text, size_t size, int *listener)
{
	struct iovec part = {.iov_base = text, .iov_len = size};
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
				 .msg_controllen = sizeof control.bytes};
	ssize_t received;

	do
		received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
	while (received < 0 && errno == EINTR);
	struct cmsghdr *header = received > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(listener, CMSG_DATA(header), sizeof(int));
	return received;
}

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Starts the program; returns its pid after it was executed, or reports the failure and exits. */
static pid_t start(const struct program *program, int *listener)
{
	int ends[2];
	struct failed failure;

	*listener = -1;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
		report_failed(CONTROL_FD, STEP_FORK, errno, 0);
		die(0);
	}
	pid_t child = fork();
	if (child < 0) {
		report_failed(CONTROL_FD, STEP_FORK, errno, 0);
		die(0);
	}
	if (child == 0)
		run_program(program, ends[1]);
	close(ends[1]);
	for (int i = 0; i < 3; i++)
		close(program->stdio[i]);

	ssize_t size = receive(ends[0], &failure, sizeof failure, listener);
	if (size > 0 && *listener >= 0) /* that was the listener's */
		size = receive(ends[0], &failure, sizeof failure, listener);
	close(ends[0]);
	if (size != 0) {
		report(&failure, size > 0 ? (size_t)size : 1);
		die(0);
	}
	report("BEGUN", 5);
	return child;
}

/* How many netlink sockets are open in the jail's network.  /proc/net/netlink lists bound ones only. */
static int count_netlink_sockets(void)
{
	static char text[16384];
	size_t size = 0;
	ssize_t part;
	int count = NETLINK_SOCKETS, fd = open("/proc/self/net/protocols", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return count;
	while ((part = read(fd, text + size, sizeof text - 1 - size)) > 0)
		size += (size_t)part;
	close(fd);
	text[size] = '\0';
	const char *line = strstr(text, "\nNETLINK ");
	if (line)
		sscanf(line, "%*s %*d %d", &count); /* name, size of one, how many */
	return count;
}

/*
 * Answers a job's socket(AF_NETLINK, ..., NETLINK_ROUTE).  No cgroup is charged for what lies unread in such
 * a socket, so there are few of them, all made here: none is under way while the others are counted.
 */
static void give_netlink_socket(int listener)
{
	struct seccomp_notif request;
	int size = NETLINK_QUEUE_BYTES / 2; /* which the kernel doubles */

	memset(&request, 0, sizeof request);
	if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request) < 0)
		return; /* the caller was killed */
	struct seccomp_notif_resp answer = {.id = request.id, .error = -ENOBUFS};
	if (count_netlink_sockets() < NETLINK_SOCKETS) {
		int type = (int)request.data.args[1];
		int made = socket(AF_NETLINK, type | SOCK_CLOEXEC, NETLINK_ROUTE);
		struct seccomp_notif_addfd gift = {.id = request.id, .srcfd = (unsigned)made,
						   .newfd_flags = type & SOCK_CLOEXEC ? O_CLOEXEC : 0};
		if (made < 0 || setsockopt(made, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) < 0 ||
		    (answer.val = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &gift)) < 0) {
			answer.error = -errno;
			answer.val = 0;
		} else {
			answer.error = 0;
		}
		if (made >= 0)
			close(made);
	}
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer); /* fails if the caller was killed */
}

static void report_ended(int wait_status, uint64_t started_ns, uint64_t ended_ns)
{
	struct rusage usage;
	getrusage(RUSAGE_CHILDREN, &usage);
	struct ended message = {
		.tag = TAG_ENDED,
		.wait_status = wait_status,
		.user_us = (uint64_t)usage.ru_utime.tv_sec * 1000000 + (uint64_t)usage.ru_utime.tv_usec,
		.system_us = (uint64_t)usage.ru_stime.tv_sec * 1000000 + (uint64_t)usage.ru_stime.tv_usec,
		.max_rss_kib = (uint64_t)usage.ru_maxrss,
		.voluntary_switches = (uint64_t)usage.ru_nvcsw,
		.involuntary_switches = (uint64_t)usage.ru_nivcsw,
		.blocks_in = (uint64_t)usage.ru_inblock,
		.blocks_out = (uint64_t)usage.ru_oublock,
		.minor_faults = (uint64_t)usage.ru_minflt,
		.major_faults = (uint64_t)usage.ru_majflt,
		.started_ns = started_ns,
		.ended_ns = ended_ns,
	};
	report(&message, sizeof message);
}

int main(int argc, char **argv)
{
	struct program program = {0};
	int fds[4], error, wait_status = 0;
	sigset_t blocked;

	/* Not traceable, and /proc/1/{fd,mem,environ,...} belong to the host's root. */
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	sigfillset(&blocked);
	sigprocmask(SIG_SETMASK, &blocked, NULL);
	/* The one argument is the number under which nsjail let the socket through. */
	int inherited = argc == 2 ? atoi(argv[1]) : -1;
	if (inherited == CONTROL_FD ? fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC) < 0
				    : dup3(inherited, CONTROL_FD, O_CLOEXEC) < 0 || close(inherited) < 0)
		die(100);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGCHLD);
	int children = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK);
	if (children < 0)
		die(100);

	char hello[] = {'H', 'E', 'L', 'L', 'O', PROTOCOL_VERSION};
	report(hello, sizeof hello);
	await_start(fds);
	memcpy(program.stdio, fds + 1, sizeof program.stdio);
	if ((error = read_spec(fds[0], &program))) {
		report_failed(CONTROL_FD, STEP_SPEC, error, 0);
		die(0);
	}

	int listener;
	uint64_t started_ns = now_ns(), ended_ns = 0;
	pid_t job = start(&program, &listener);
	struct pollfd events[] = {{.fd = CONTROL_FD, .events = POLLIN},
				  {.fd = children, .events = POLLIN},
				  {.fd = listener, .events = POLLIN}};
	for (;;) {
		struct signalfd_siginfo discard[16];
		pid_t reaped;
		int status, over = 0;

		if (poll(events, 3, -1) < 0 && errno != EINTR)
			die(104);
		if (events[0].revents) /* KILL, or the supervisor is gone */
			over = 1;
		if (events[2].revents & POLLIN)
			give_netlink_socket(listener);
		else if (events[2].revents) /* nobody is left who could ask */
			events[2].fd = -1;
		while (read(children, discard, sizeof discard) > 0)
			;
		while ((reaped = waitpid(-1, &status, WNOHANG)) > 0)
			if (reaped == job) {
				ended_ns = now_ns();
				wait_status = status;
				job = 0;
				over = 1;
			}
		if (over)
			break;
	}
	/* Nothing outlives the program: one signal reaches every process of the namespace but us, and a
	 * fork under way fails while SIGKILL is pending.  Reap them all: what is reaped is counted. */
	kill(-1, SIGKILL);
	for (;;) {
		int status;
		pid_t reaped = waitpid(-1, &status, 0);
		if (reaped == job && job > 0) {
			ended_ns = now_ns();
			wait_status = status;
		}
		if (reaped < 0 && errno == ECHILD)
			break;
	}
	report_ended(wait_status, started_ns, ended_ns);
	/* The supervisor reads our /proc entry (I/O of reaped children), then closes the socket. */
	char last;
	while (recv(CONTROL_FD, &last, 1, 0) > 0)
		;
	return 0;
}
