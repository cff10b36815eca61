/* Gives up the CPU 1000 times. */
#include <time.h>

int main(void)
{
	struct timespec pause = {0, 100000};
	for (int i = 0; i < 1000; i++)
		nanosleep(&pause, 0);
	return 0;
}
