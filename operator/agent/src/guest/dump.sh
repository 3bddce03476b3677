#!/bin/sh
# Runs CRIU in a guest so that neither a console that is lost nor time that runs out leaves a process standing.
#
# Arguments: a folder that is a tmpfs of its own, seconds, and CRIU's arguments. Descriptor 8 is the reading end of a
# fifo that the console's shell holds open: when that ends, nobody wants the images any more. Ending the process that
# waits for it (lease.pid) says the same. CRIU calls this file too.
case $CRTOOLS_SCRIPT_ACTION in
'') ;;
post-dump)
  # The processes stand still, so these files are of the same moment as their memory. Status 1 says that a file was
  # changed meanwhile, which somebody else can do.
  "$ROOTFS_TAR" --create --file "$ROOTFS_DIFF" --sparse --numeric-owner --one-file-system --newer="@$ROOTFS_SINCE" \
    --anchored --no-wildcards --exclude-from="$ROOTFS_WITHOUT" --directory "$ROOTFS" . || [ $? = 1 ]
  exit
  ;;
*) exit 0 ;;
esac

folder=$1 limit=$2
shift 2
(
  criu "$@" > "$folder/words" 2>&1 &
  echo $! > "$folder/criu.pid"
  wait $!
  # A link, because that needs no room.
  ln -s $? "$folder/status"
) 8<&- &

timeout "$limit" cat <&8 > /dev/null 2>&1 &
echo $! > "$folder/lease.pid"
wait $!

ended() { [ -h "$folder/status" ]; }
patience() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    ! ended || return 0
    sleep "$1" || sleep 1
  done
}
if ! ended; then
  # Without room for its next page CRIU takes its code out of the processes and lets them go. Killed, it might not.
  for more in 0 256 1024 4096 16384; do
    used=$(df -k "$folder" | { read -r _ && read -r _ _ used _ && echo "$used"; })
    ! mount -o "remount,size=$((used + more))k" "$folder" || break
  done
  patience 0.2
  ended || kill -KILL "$(cat "$folder/criu.pid")"
  patience 0.1
fi
cd /
umount -l "$folder"
rmdir "$folder"
