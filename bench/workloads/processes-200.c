/* Is 200 processes at one time, itself included. */
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
	for (int i = 0; i < 199; i++)
		if (fork() == 0) {
			sleep(1);
			_exit(0);
		}
	while (wait(0) > 0)
		;
	return 0;
}
