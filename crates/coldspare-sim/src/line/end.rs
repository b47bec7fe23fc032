//! A network namespace with one TUN device.

#![allow(unsafe_code)] // no crate that is here wraps these two calls

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// One end of a line; it lasts as long as this, and the programs in it.
#[derive(Debug)]
pub struct End {
    namespace: OwnedFd,
    pub(super) device: File,
}

impl End {
    /// Makes a namespace with the address `here`, from which `there` can be reached.
    pub(super) fn new(here: &str, there: &str, mtu: u16) -> io::Result<End> {
        // On a thread of its own: a namespace is the thread's, and this one's is not to change.
        on_own_thread(|| {
            // SAFETY: only this thread's network is another one then; it has no sockets, and ends.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            let namespace = open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            let device = open_tun()?;
            // A kernel without IPv6 has nothing to say by itself.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            ip(&["addr", "add", here, "peer", there, "dev", DEVICE])?;
            // Nobody is asked for or told anything, and nothing waits in the device's own queue: the line's is what counts.
            ip(&["link", "set", DEVICE, "txqueuelen", "10000", "multicast", "off", "up"])?;
            ip(&["link", "set", "lo", "up"])?;
            // As if a router had said so: TCP goes by it, QUIC finds out by itself.
            ip(&["route", "replace", there, "dev", DEVICE, "src", here, "mtu", &mtu.to_string()])?;
            Ok(End { namespace, device })
        })
    }

    /// What a command has to begin with to be run here.
    pub fn wrapper(&self) -> Vec<String> {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        vec!["nsenter".into(), format!("--net={path}"), "--".into()]
    }

    /// Does some work here, on a thread of its own: sockets that it opens belong to this end.
    ///
    /// # Errors
    /// Those of the work; that the namespace can't be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes the device in this thread's namespace; it goes with the file.
fn open_tun() -> io::Result<File> {
    let file = File::from(open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?);
    // SAFETY: all zeros are a value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq` at most.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn ip(args: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(args).output().map_err(|e| io::Error::other(format!("ip (of iproute2): {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

const DEVICE: &str = "line0";
