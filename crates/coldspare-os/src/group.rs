//! A child in a process group of its own: waiting for it with a time limit, and ending all of the group.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

/// A child that leads a process group, until it is reaped.
///
/// Its number, and so that of its group, can't be anybody else's before [`GroupLeader::reap`].
#[derive(Debug)]
pub struct GroupLeader {
    child: Child,
    pid: Pid,
    exit: OwnedFd,
}

impl GroupLeader {
    /// Starts `command` as the leader of a new process group.
    ///
    /// # Errors
    /// As `fork` and `execve`; `ENOSYS` on Linux before 5.3.
    pub fn spawn(command: &mut Command) -> io::Result<GroupLeader> {
        let mut child = command.process_group(0).spawn()?;
        let pid = Pid::from_child(&child);
        match retry_on_intr(|| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(exit) => Ok(GroupLeader { child, pid, exit }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e.into())
            }
        }
    }

    /// The child's standard streams are here.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits until it has ended, or one of `streams` has something to read or is closed, at most for `limit`.
    ///
    /// Says whether it has ended, and for each stream whether a read returns at once. It is not reaped.
    ///
    /// # Errors
    /// As `poll`.
    pub fn wait(&self, streams: &[BorrowedFd<'_>], limit: Duration) -> io::Result<(bool, Vec<bool>)> {
        let mut fds = vec![PollFd::new(&self.exit, PollFlags::IN)];
        fds.extend(streams.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        let limit = Timespec { tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        Ok((ready[0], ready[1..].to_vec()))
    }

    /// Asks all of the group to end (SIGTERM).
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Kills all of the group.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Waits for its end and forgets it.
    ///
    /// # Errors
    /// As `waitpid`.
    pub fn reap(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// A group without members is no trouble.
    fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.pid, signal);
    }
}

/// A process that is meant by its descriptor: its number may be another's one day, this handle stays with the one.
#[derive(Debug)]
pub struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    /// Takes hold of the process `pid`; `None` when there is none.
    ///
    /// # Errors
    /// As `pidfd_open`.
    pub fn open(pid: i32) -> io::Result<Option<ProcessHandle>> {
        let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
        match retry_on_intr(|| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(fd) => Ok(Some(ProcessHandle(fd))),
            Err(Errno::SRCH | Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Kills it; that it has ended is no error.
    ///
    /// # Errors
    /// `EPERM`.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.0.as_fd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_group_is_killed_and_its_end_is_waited_for() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "sleep 300 & echo $!; wait"]).stdout(std::process::Stdio::piped());
        let mut leader = GroupLeader::spawn(&mut command).unwrap();
        let mut out = leader.child().stdout.take().unwrap();
        let (ended, ready) = leader.wait(&[out.as_fd()], Duration::from_secs(20)).unwrap();
        assert_eq!((ended, ready), (false, vec![true]));
        let mut bytes = [0; 32];
        let n = io::Read::read(&mut out, &mut bytes).unwrap();
        let sleeper: i32 = std::str::from_utf8(&bytes[..n]).unwrap().trim().parse().unwrap();
        assert!(ProcessHandle::open(sleeper).unwrap().is_some());
        leader.kill();
        assert!(leader.wait(&[], Duration::from_secs(20)).unwrap().0);
        assert!(!leader.reap().unwrap().success());
        // The pipe closes when the last one that holds it has gone.
        assert_eq!(io::Read::read(&mut out, &mut bytes).unwrap(), 0);
    }

    #[test]
    fn there_is_no_handle_of_nobody() {
        assert!(ProcessHandle::open(i32::MAX).unwrap().is_none());
        assert!(ProcessHandle::open(0).unwrap().is_none());
    }
}
