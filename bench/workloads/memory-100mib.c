/* Touches every page of 100 MiB. */
#include <stdlib.h>

int main(void)
{
	volatile char *memory = malloc(100 << 20);
	for (int i = 0; i < 100 << 20; i += 4096)
		memory[i] = 1;
	return 0;
}
