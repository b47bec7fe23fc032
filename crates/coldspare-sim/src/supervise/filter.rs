//! The kernel's side: the filter that stops calls, how its listener gets to the supervisor, questions and answers.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{sock_filter, sock_fprog};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};
use rustix::process::Pid;

use super::call::{Asked, CALLS};

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Go,
    Fail(Errno),
    Kill,
}

/// A channel for one descriptor: our end, and the program's.
pub(super) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Lets `command` put itself under the filter, and send the filter's listener, before it becomes the program.
pub(super) fn install_before_exec(command: &mut Command, channel: OwnedFd) -> io::Result<()> {
    let program = program()?;
    let install = move || {
        let listener = install(&program)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [listener.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let pid = rustix::process::getpid().as_raw_nonzero().get().to_ne_bytes();
        rustix::net::sendmsg(&channel, &[io::IoSlice::new(&pid)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls on memory that was made before, and allocates nothing.
    unsafe { command.pre_exec(install) };
    Ok(())
}

/// The listener that the program sends, and the program's pid; `None` when it never comes.
pub(super) fn receive(channel: &OwnedFd) -> Option<(Pid, OwnedFd)> {
    let mut pid = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(channel, &mut [io::IoSliceMut::new(&mut pid)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    let listener = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if got.bytes != pid.len() {
        return None;
    }
    Some((Pid::from_raw(i32::from_ne_bytes(pid))?, listener?))
}

/// The next question; `None` when the thread that asked is gone, or a signal came.
pub(super) fn next(listener: &OwnedFd) -> Option<Asked> {
    // SAFETY: all of its fields are numbers, for which zero is a value; the kernel wants it zeroed.
    let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is a seccomp listener, and the kernel writes one `seccomp_notif` where it is pointed to.
    let got = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &mut question) };
    (got == 0).then(|| Asked { id: question.id, thread: question.pid, number: question.data.nr.into(), args: question.data.args })
}

/// Answers a question; to a thread that is gone, nothing.
pub(super) fn answer(listener: &OwnedFd, asked: &Asked, answer: Answer) {
    let (error, flags) = match answer {
        Answer::Fail(errno) => (-errno.raw_os_error(), 0),
        Answer::Go | Answer::Kill => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
    };
    let response = libc::seccomp_notif_resp { id: asked.id, val: 0, error, flags };
    // SAFETY: the descriptor is a seccomp listener, and the kernel reads one `seccomp_notif_resp` where it is pointed to.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &response) };
}

/// Puts the calling process under the filter.
fn install(program: &[sock_filter]) -> io::Result<OwnedFd> {
    rustix::thread::set_no_new_privs(true)?;
    let program = sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the kernel reads a `sock_fprog` and the instructions that it points to, which live until the call returns.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program) };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}

/// The filter: asks for the calls of the list, lets all others go.
///
/// Opens are asked for only when they may create, `ioctl` only when it clones a file.
fn program() -> io::Result<Vec<sock_filter>> {
    if size_of::<usize>() != 8 || cfg!(target_endian = "big") || !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let load = |at: usize| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at as u32, 0, 0);
    let give = |what: u32| step(libc::BPF_RET | libc::BPF_K, what, 0, 0);
    let unless_equal = |value: u32, skip: u8| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, skip);
    let unless_set = |bits: u32, skip: u8| step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits, 0, skip);
    let (ask, go) = (give(libc::SECCOMP_RET_USER_NOTIF), give(libc::SECCOMP_RET_ALLOW));
    let mut out = vec![load(NUMBER_AT)];
    for listed in CALLS.iter() {
        let number = listed.number as u32;
        match creates_flags(listed.number) {
            Some(arg) => out.extend([unless_equal(number, 4), load(arg_at(arg)), unless_set(libc::O_CREAT as u32, 1), ask, go]),
            None if listed.number == libc::SYS_ioctl => {
                out.extend([unless_equal(number, 4), load(arg_at(1)), unless_equal(libc::FICLONE as u32, 1), ask, go]);
            }
            None => out.extend([unless_equal(number, 1), ask]),
        }
    }
    out.push(go);
    Ok(out)
}

fn step(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Which argument of an open says whether it creates.
fn creates_flags(number: i64) -> Option<usize> {
    match number {
        libc::SYS_openat => Some(2),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => Some(1),
        _ => None,
    }
}

/// Where the kernel shows the number of the call to a filter.
const NUMBER_AT: usize = std::mem::offset_of!(libc::seccomp_data, nr);

/// Where it shows the lower half of an argument.
fn arg_at(n: usize) -> usize {
    std::mem::offset_of!(libc::seccomp_data, args) + 8 * n
}
