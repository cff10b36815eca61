/* The control: what it costs to be a program at all. */
int main(void)
{
	return 0;
}
