//! Who changed something.

use std::fs;
use std::os::unix::ffi::OsStrExt;

/// The process that changed something, as far as it could be told when its event was read: it may be gone by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number, in the helper's namespace.
    pub pid: u32,
    /// Its short name; empty when it was gone.
    pub command: String,
    /// The program that it runs, or what it calls itself where that may not be read; empty when it was gone.
    pub program: String,
}

impl Process {
    /// Asks `/proc` who has this number now.
    pub(super) fn find(pid: u32) -> Process {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_string();
        let link = fs::read_link(format!("/proc/{pid}/exe")).ok();
        let program = link.map(|path| text(path.as_os_str().as_bytes()));
        let own_name = || text(read("cmdline").split(|&b| b == 0).next().unwrap_or_default());
        Process { pid, command: text(&read("comm")), program: program.unwrap_or_else(own_name) }
    }
}
