#!/bin/sh
# Runs one command inside the task's container, so that its file system
# survives its end: however the command ends, this script exits 0 and leaves in OUT
# what it saw. Only a SIGKILL that is meant for it takes both.
#
#   supervisor.sh RUN LIMIT GRACE OUT STOP ARTIFACTS WORKSPACE COMMAND...
#
#   RUN        makes the call unique to the engine's cache; not read
#   LIMIT      seconds that the command may take; the clock starts with it
#   GRACE      seconds between SIGTERM and SIGKILL
#   OUT        directory for our own files: result, ended, specials, setuid, and
#              before and after, which list the workspace when it goes back
#   STOP       a file that asks for an early end: boot id, and centiseconds since
#   ARTIFACTS  directory to clear of what must not travel
#   WORKSPACE  likewise, or empty when the workspace does not go back
#
# Our variables begin with mm_: one that the task's environment also has would
# reach the command with our value.
#
# shellcheck disable=SC2034 # Some words are read only to be left out of the others.
#
# POSIX shell, for dash, bash and busybox; besides a shell it needs sleep, date,
# find, rm and chmod, and wc for a count. An image without them brings a static busybox,
# mounted here.
mm_busybox=/.moonmind/busybox
if [ -x "$mm_busybox" ]; then
    for mm_tool in sleep date find rm chmod wc; do
        eval "$mm_tool() { $mm_busybox $mm_tool \"\$@\"; }"
    done
fi

# Signals below go to every process of the PID namespace. That is the task's own
# only where an init is our parent, so never run by hand in somebody's terminal.
if [ "$PPID" != 1 ]; then
    echo "supervisor.sh: refused: it signals every process it sees and must be started by a container's init" >&2
    exit 125
fi

mm_limit=$2 mm_grace=$3 mm_out=$4 mm_stop=$5 mm_artifacts=$6 mm_workspace=$7
shift 7
mm_reason=

# Our tools must be found whatever PATH the task's environment sets; the command
# gets it back as it was.
mm_path=$PATH
PATH=$PATH:/usr/local/bin:/usr/bin:/bin

# The command may signal its whole process group, which is ours too where there is no
# setsid. Handlers, since ignored signals would be inherited by the command.
steady() {
    trap : HUP INT QUIT USR1 USR2 PIPE ALRM TERM
}
steady
mm_setsid=$(command -v setsid)

# Centiseconds since boot, in $mm_up: the one clock that all shells can read and
# nobody sets back.
uptime() {
    read -r mm_up mm_idle </proc/uptime
    mm_up=${mm_up%.*}${mm_up#*.}
}

nap() {
    # A fraction is no POSIX, but where it works a task's end is seen sooner.
    sleep 0.1 2>/dev/null || sleep 1
}

# Whether a process of the task is left. Zombies do not count: their parents may
# never fetch them.
others() {
    for mm_process in /proc/[0-9]*; do
        mm_process=${mm_process#/proc/}
        case $mm_process in 1 | "$$" | "$mm_watchdog") continue ;; esac
        { read -r mm_stat <"/proc/$mm_process/stat"; } 2>/dev/null || continue
        case ${mm_stat##*) } in Z*) ;; *) return 0 ;; esac
    done
    return 1
}

# A stop is written with its time: one of an earlier run is not meant for us. Not by
# the files' own times, of which busybox compares the seconds only.
asked_to_stop() {
    [ -f "$mm_stop" ] && { read -r mm_stop_boot mm_stop_up <"$mm_stop"; } 2>/dev/null &&
        [ "$mm_stop_boot" = "$mm_boot" ] && [ "$mm_stop_up" -ge "$mm_began" ]
}

# In the background: waits for the limit or the stop file, then ends every
# process of the task, grandchildren and new sessions too. `kill -1` spares PID 1
# and the caller; the supervisor itself has its handler.
watch() {
    steady
    read -r mm_watchdog mm_rest </proc/self/stat
    mm_reason=
    while [ -z "$mm_reason" ]; do
        nap
        uptime
        if [ "$mm_up" -ge "$mm_deadline" ]; then
            mm_reason=timed-out
        elif asked_to_stop; then
            mm_reason=cancelled
        fi
    done
    echo "$mm_reason" >"$mm_out/ended"
    kill -TERM -1

    uptime
    mm_deadline=$((mm_up + mm_grace * 100))
    while others && [ "$mm_up" -lt "$mm_deadline" ]; do
        nap
        uptime
    done

    # Stopped first, so that nothing forks away while we go through them.
    kill -STOP -1
    for mm_process in /proc/[0-9]*; do
        mm_process=${mm_process#/proc/}
        case $mm_process in 1 | "$$" | "$mm_watchdog") ;; *) kill -KILL "$mm_process" ;; esac
    done
    kill -CONT "$$"
}

# Takes out of DIRECTORY what must not travel, each named, NUL between names:
# devices, pipes and sockets are removed, setuid and setgid bits are cleared.
clear_hostile() {
    find "$1" -xdev ! -type f ! -type d ! -type l -print0 -exec rm -f {} + >>"$mm_out/specials"
    find "$1" -xdev -type f \( -perm -4000 -o -perm -2000 \) -print0 -exec chmod ug-s {} + >>"$mm_out/setuid"
}

# Lists the workspace into a file: names with a NUL after each, a directory's twice, and
# three times where it may not be looked into. Nothing below a .git; that changes, and
# never goes back. The last says whether that was all.
list_workspace() {
    {
        (
            cd "$mm_workspace" && find . -xdev -name .git -print0 -prune -o \
                -type d ! -perm -500 -print0 -print0 -print0 -prune -o \
                -type d -print0 -print0 -o -print0
        )
        printf '//%s\0' "$?"
    } >"$mm_out/$1" 2>/dev/null
}

# Whether something is in DIRECTORY, or may be: most tasks leave nothing, and looking for
# what must not travel starts a program each time.
holds_something() {
    [ -r "$1" ] && [ -w "$1" ] && [ -x "$1" ] || return 0
    for mm_entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        if [ -e "$mm_entry" ] || [ -L "$mm_entry" ]; then
            return 0
        fi
    done
    return 1
}

# Says how many files are in DIRECTORY, for whoever fetches them: a hint, no more.
count_files() {
    find "$1" -xdev -type f | wc -l
}

# What is gone afterwards cannot be seen in what the command wrote. Not on its time.
[ -z "$mm_workspace" ] || list_workspace before

read -r mm_boot </proc/sys/kernel/random/boot_id
mm_epoch=$(date +%s)
uptime
mm_began=$mm_up
mm_deadline=$((mm_began + mm_limit * 100))

watch </dev/null >/dev/null 2>&1 &
mm_watchdog=$!

# In the foreground, since a shell's background commands ignore SIGINT; by exec,
# so that no builtin or function of ours stands in for the program that is meant.
(PATH=$mm_path && exec $mm_setsid "$@") 2>&1
mm_code=$?
uptime
mm_finished=$mm_up

# The limit or a stop: what the command started has its grace period too.
if [ -f "$mm_out/ended" ]; then
    wait "$mm_watchdog"
    read -r mm_reason <"$mm_out/ended"
    case $mm_reason in timed-out | cancelled) ;; *) mm_reason= ;; esac
    uptime
    mm_finished=$mm_up
fi

# As with a container whose PID 1 ends: nothing goes on, and nothing can change
# the files while we look through them.
kill -KILL -1 2>/dev/null

# The command may have put something else in their places.
rm -rf "$mm_out/specials" "$mm_out/setuid" "$mm_out/result" "$mm_out/after"
[ -f "$mm_out/log" ] || rm -rf "$mm_out/log"

mm_files=0
if holds_something "$mm_artifacts"; then
    # An ordinary user's export ends at a directory that it may not write to. By \;, so
    # that find goes into what it could not enter before.
    find "$mm_artifacts" -xdev -type d ! -perm -700 -exec chmod u+rwx {} \; 2>/dev/null
    clear_hostile "$mm_artifacts" 2>/dev/null
    mm_files=$(count_files "$mm_artifacts" 2>/dev/null)
    # The wc may be the command's own.
    [ "$mm_files" -ge 0 ] 2>/dev/null || mm_files=
fi
if [ -n "$mm_workspace" ]; then
    clear_hostile "$mm_workspace" 2>/dev/null
    list_workspace after
fi

mm_hostile=
[ ! -s "$mm_out/specials" ] && [ ! -s "$mm_out/setuid" ] || mm_hostile=yes
printf 'exit=%s\nended=%s\nepoch=%s\nboot=%s\nbegan=%s\nfinished=%s\nhostile=%s\nfiles=%s\n' \
    "$mm_code" "$mm_reason" "$mm_epoch" "$mm_boot" "$mm_began" "$mm_finished" "$mm_hostile" \
    "$mm_files" >"$mm_out/result"
exit 0
