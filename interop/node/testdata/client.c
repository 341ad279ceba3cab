/*
 * client.c: a program on glibc that makes the calls it is told to, one line each, and answers each
 * with a line of JSON. The words are those of clients_test.go.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static const char *text(const struct sockaddr_storage *a)
{
	static char out[2][80];
	static int turn;
	char ip[INET6_ADDRSTRLEN] = "";
	char *s = out[turn++ & 1];

	if (a->ss_family == AF_INET6) {
		const struct sockaddr_in6 *in = (const void *)a;

		inet_ntop(AF_INET6, &in->sin6_addr, ip, sizeof(ip));
		snprintf(s, sizeof(out[0]), "[%s]:%d", ip, ntohs(in->sin6_port));
	} else {
		const struct sockaddr_in *in = (const void *)a;

		inet_ntop(AF_INET, &in->sin_addr, ip, sizeof(ip));
		snprintf(s, sizeof(out[0]), "%s:%d", ip, ntohs(in->sin_port));
	}
	return s;
}

static void refuse(int err, long began)
{
	if (err == EAGAIN || err == EINPROGRESS) /* socket(7): a call that SO_RCVTIMEO or SO_SNDTIMEO ended */
		err = ETIMEDOUT;
	printf("{\"errno\":%d,\"nanos\":%ld}\n", err, now_ns() - began);
}

static void answer(const char *said, const struct sockaddr_storage *peer, const struct sockaddr_storage *local, long took)
{
	char *end = strpbrk(said, "\r\n");

	if (end)
		*end = 0;
	printf("{\"text\":\"%s\",\"peer\":\"%s\",\"local\":\"%s\",\"nanos\":%ld}\n", said, text(peer), text(local), took);
}

static void call(const char *op, const char *net, const char *host, const char *port)
{
	struct addrinfo hints = { .ai_socktype = *op == 't' ? SOCK_STREAM : SOCK_DGRAM }, *to;
	struct sockaddr_storage peer = {}, local = {};
	struct timeval patience = { .tv_sec = 2 };
	socklen_t len = sizeof(peer), local_len = sizeof(local);
	char said[4096];
	size_t n = 0;
	ssize_t got;
	long began, took;
	int fd, err;

	hints.ai_family = *net == '4' ? AF_INET : *net == 'a' ? AF_UNSPEC : AF_INET6;
	if (*net == 'm')
		hints.ai_flags = AI_V4MAPPED;
	err = getaddrinfo(host, port, &hints, &to);
	if (err) {
		printf("{\"fault\":\"getaddrinfo: %s\"}\n", gai_strerror(err));
		return;
	}
	fd = socket(to->ai_family, to->ai_socktype, 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	began = now_ns();
	if (!strcmp(op, "udp")) {
		err = sendto(fd, "ask", 3, 0, to->ai_addr, to->ai_addrlen);
		if (err < 0) {
			refuse(errno, began);
			goto out;
		}
		got = recvfrom(fd, said, sizeof(said) - 1, 0, (void *)&peer, &len);
		took = now_ns() - began;
	} else {
		if (connect(fd, to->ai_addr, to->ai_addrlen)) {
			refuse(errno, began);
			goto out;
		}
		took = now_ns() - began;
		getpeername(fd, (void *)&peer, &len);
		if (*op == 't') {
			const char *ask = "GET / HTTP/1.0\r\n\r\n";

			if (send(fd, ask, strlen(ask), MSG_NOSIGNAL) < 0) {
				refuse(errno, began);
				goto out;
			}
			while ((got = recv(fd, said + n, sizeof(said) - 1 - n, 0)) > 0)
				n += got;
		} else {
			send(fd, "ask", 3, 0);
			got = recv(fd, said, sizeof(said) - 1, 0);
		}
	}
	if (got < 0) {
		refuse(errno, began);
		goto out;
	}
	if (*op == 'u')
		n = got;
	said[n] = 0;
	getsockname(fd, (void *)&local, &local_len);
	if (*op == 't') {
		char *body = strstr(said, "\r\n\r\n");

		answer(body ? body + 4 : said, &peer, &local, took);
	} else {
		answer(said, &peer, &local, took);
	}
out:
	close(fd);
	freeaddrinfo(to);
}

int main(void)
{
	char op[16], net[16], host[256], port[16];

	setvbuf(stdout, NULL, _IOLBF, 0);
	while (scanf("%15s %15s %255s %15s", op, net, host, port) == 4)
		call(op, net, host, port);
	return 0;
}
