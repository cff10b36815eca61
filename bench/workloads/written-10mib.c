/* Writes 10 MiB into a file. */
#include <fcntl.h>
#include <unistd.h>

int main(void)
{
	static char block[65536];
	int file = open("out", O_CREAT | O_WRONLY, 0600);
	for (int i = 0; i < 160; i++)
		if (write(file, block, sizeof block) != sizeof block)
			return 1;
	return 0;
}
