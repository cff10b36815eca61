/*
 * Attacks on the jail's init and on the kernel's side of the jail, one per name given.
 * Prints "NAME ERRNO" for each: 0 means that the kernel let it through.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char page[4096];

static long attack(const char *name)
{
	struct rlimit limit = {0, 0};
	struct sched_param param = {0};
	struct iovec here = {page, sizeof page}, there = {(void *)0x400000, sizeof page};
	cpu_set_t cpus;

#define IS(text) (strcmp(name, text) == 0)
	/* On PID 1. */
	if (IS("kill")) return kill(1, SIGKILL);
	if (IS("kill_int")) return kill(1, SIGINT);
	if (IS("tgkill")) return syscall(SYS_tgkill, 1, 1, SIGKILL);
	if (IS("ptrace_attach")) return ptrace(PTRACE_ATTACH, 1, 0, 0);
	if (IS("ptrace_seize")) return ptrace(PTRACE_SEIZE, 1, 0, 0);
	if (IS("proc_fd")) return open("/proc/1/fd/3", O_WRONLY);
	if (IS("proc_mem")) return open("/proc/1/mem", O_RDWR);
	if (IS("proc_root")) return open("/proc/1/root/etc/shadow", O_RDONLY);
	if (IS("proc_oom")) return open("/proc/1/oom_score_adj", O_WRONLY);
	if (IS("vm_write")) return process_vm_writev(1, &here, 1, &there, 1, 0);
	if (IS("vm_read")) return process_vm_readv(1, &here, 1, &there, 1, 0);
	if (IS("prlimit_cpu")) return prlimit(1, RLIMIT_CPU, &limit, NULL);
	if (IS("prlimit_fsize")) return prlimit(1, RLIMIT_FSIZE, &limit, NULL);
	if (IS("setpriority")) return setpriority(PRIO_PROCESS, 1, 19);
	if (IS("sched_setscheduler")) return sched_setscheduler(1, SCHED_IDLE, &param);
	if (IS("sched_setaffinity")) { CPU_ZERO(&cpus); CPU_SET(0, &cpus); return sched_setaffinity(1, sizeof cpus, &cpus); }
	if (IS("pidfd_getfd")) {
		int pidfd = (int)syscall(SYS_pidfd_open, 1, 0);
		return syscall(SYS_pidfd_getfd, pidfd, 3, 0);
	}
	if (IS("pidfd_signal")) {
		int pidfd = (int)syscall(SYS_pidfd_open, 1, 0);
		return syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
	}
	/* On the kernel. */
	if (IS("unshare_user")) return unshare(CLONE_NEWUSER);
	if (IS("unshare_net")) return unshare(CLONE_NEWNET);
	if (IS("clone_user")) return syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	if (IS("clone3")) { char args[88] = {0}; return syscall(SYS_clone3, args, sizeof args); }
	if (IS("setns")) return setns(open("/proc/self/ns/net", O_RDONLY), 0);
	if (IS("mount")) return mount("none", "/tmp", "tmpfs", 0, "");
	if (IS("chroot")) return chroot("/tmp");
	if (IS("fsopen")) return syscall(SYS_fsopen, "tmpfs", 0);
	if (IS("keyctl")) return syscall(SYS_keyctl, 0, -3, 1);
	if (IS("add_key")) return syscall(SYS_add_key, "user", "x", "y", 1, -4);
	if (IS("io_uring")) { char params[120] = {0}; return syscall(SYS_io_uring_setup, 1, params); }
	if (IS("userfaultfd")) return syscall(SYS_userfaultfd, 1);
	if (IS("bpf")) { char attr[64] = {0}; return syscall(SYS_bpf, 5, attr, sizeof attr); }
	if (IS("perf")) { char attr[128] = {0}; return syscall(SYS_perf_event_open, attr, 0, -1, -1, 0); }
	if (IS("vsock")) return socket(AF_VSOCK, SOCK_STREAM, 0);
	if (IS("packet")) return socket(AF_PACKET, SOCK_RAW, 0);
	if (IS("raw")) return socket(AF_INET, SOCK_RAW, 1);
	if (IS("raw6")) return socket(AF_INET6, SOCK_RAW, 58);
	if (IS("alg")) return socket(38, SOCK_SEQPACKET, 0);
	if (IS("setuid")) return setuid(0);
	if (IS("setgid")) return setgid(0);
	if (IS("sethostname")) return sethostname("x", 1);
	if (IS("syslog")) return syscall(SYS_syslog, 3, page, sizeof page);
	if (IS("memfd_secret")) return syscall(447, 0);
#if defined(__x86_64__)
	if (IS("x32")) return syscall(0x40000000 | 39);
#endif
	/* Controls: what an ordinary program does must go through. */
	if (IS("control_socket")) return socket(AF_INET, SOCK_STREAM, 0);
	if (IS("control_netlink")) return socket(AF_NETLINK, SOCK_RAW, 0);
	if (IS("control_fork")) { pid_t child = fork(); if (!child) _exit(0); return child; }
	if (IS("control_prlimit")) return prlimit(0, RLIMIT_CORE, &limit, NULL);
	if (IS("control_kill")) return kill(getpid(), 0);
	errno = 9999;
	return -1;
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		errno = 0;
		long result = attack(argv[i]);
		printf("%s %d\n", argv[i], result < 0 ? errno : 0);
		fflush(stdout);
	}
	return 0;
}
