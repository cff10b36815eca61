/* Uses 500 ms of CPU time by its own clock. */
#include <time.h>

int main(void)
{
	struct timespec used;
	do
		clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
	while (used.tv_sec * 1000 + used.tv_nsec / 1000000 < 500);
	return 0;
}
