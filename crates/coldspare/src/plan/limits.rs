//! What the kernel grants too little of for this home.

use std::fs;

use coldspare_os::fanotify::Fanotify;
use coldspare_transport::{SocketBuffers, Tuning};
use serde::Serialize;

/// How many folders a user may watch.
pub(crate) const INOTIFY_WATCHES: &str = "fs.inotify.max_user_watches";
/// As the systemd units have it.
const OPEN_FILES: u64 = 65_536;

/// A limit to raise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Limit {
    /// As `sysctl` or the systemd unit names it.
    pub(crate) name: &'static str,
    pub(crate) present: u64,
    pub(crate) needed: u64,
    pub(crate) why: String,
}

/// What this process found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Whether one mark a filesystem can be had, instead of a watch a folder.
    pub(crate) fanotify: bool,
    pub(crate) inotify_watches: Option<u64>,
    pub(crate) buffers: Option<SocketBuffers>,
    pub(crate) open_files: u64,
}

impl Granted {
    /// As it is for this process, now.
    pub(crate) fn to_this_process() -> Granted {
        Granted {
            fanotify: Fanotify::new().is_ok(),
            inotify_watches: present(INOTIFY_WATCHES),
            buffers: SocketBuffers::probe(Tuning::default().socket_buffer_bytes).ok(),
            open_files: coldspare_os::open_files_limit_max(),
        }
    }

    /// What a home of so many folders needs beyond it.
    pub(crate) fn to_raise(self, folders: u64) -> Vec<Limit> {
        let mut all = Vec::new();
        let mut raise = |name, present: u64, needed: u64, why: &str| {
            if present < needed {
                all.push(Limit { name, present, needed, why: why.into() });
            }
        };
        if let (false, Some(watches)) = (self.fanotify, self.inotify_watches) {
            raise(INOTIFY_WATCHES, watches, folders, "a watch a folder; root, with fanotify, needs none");
        }
        if let Some(SocketBuffers { asked_bytes, receive_bytes, send_bytes }) = self.buffers {
            let why = "links above 100 Mbit/s lose packets in bursts, unless the daemons have CAP_NET_ADMIN";
            raise("net.core.rmem_max", receive_bytes as u64, asked_bytes as u64, why);
            raise("net.core.wmem_max", send_bytes as u64, asked_bytes as u64, why);
        }
        raise("LimitNOFILE", self.open_files, OPEN_FILES, "open files; the systemd units set it");
        all
    }
}

/// What a limit is now, by its name.
pub(crate) fn present(name: &str) -> Option<u64> {
    fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOUGH: Granted = Granted {
        fanotify: true,
        inotify_watches: Some(8_192),
        buffers: Some(SocketBuffers { asked_bytes: 8 << 20, receive_bytes: 8 << 20, send_bytes: 8 << 20 }),
        open_files: 1 << 20,
    };

    fn check(granted: Granted, expected: &[(&str, u64, u64)]) {
        let found = granted.to_raise(100_000);
        assert_eq!(found.iter().map(|l| (l.name, l.present, l.needed)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn only_what_is_too_low_is_named() {
        check(ENOUGH, &[]);
        check(Granted { fanotify: false, ..ENOUGH }, &[("fs.inotify.max_user_watches", 8_192, 100_000)]);
        check(Granted { fanotify: false, inotify_watches: Some(100_000), ..ENOUGH }, &[]);
        let small = SocketBuffers { asked_bytes: 8 << 20, receive_bytes: 212_992, send_bytes: 8 << 20 };
        check(Granted { buffers: Some(small), ..ENOUGH }, &[("net.core.rmem_max", 212_992, 8 << 20)]);
        check(Granted { open_files: 1_024, ..ENOUGH }, &[("LimitNOFILE", 1_024, 65_536)]);
    }

    #[test]
    fn a_limit_is_read_by_its_name() {
        assert!(present("kernel.pid_max").is_some_and(|n| n > 0));
        assert_eq!(present("kernel.no_such_limit"), None);
    }
}
