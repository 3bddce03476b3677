/* Holds one perf event of a task for as long as node2 runs.
 *
 * A hardware breakpoint is such an event, and the probe sets one. The first that is made and the last that goes make the
 * kernel patch its scheduler (the static key perf_sched_events), and an emulated machine with several processors does not
 * always survive that: "Oops: int3" in __schedule. With one that stays, nothing is patched any more.
 */
#include <linux/perf_event.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void) {
  struct perf_event_attr attr;
  memset(&attr, 0, sizeof attr);
  attr.size = sizeof attr;
  attr.type = PERF_TYPE_SOFTWARE;
  attr.config = PERF_COUNT_SW_DUMMY;
  if (syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0) < 0) return 1;
  for (;;) pause();
}
