//! The watch's helper: this program once more, as a process that has the privileges of fanotify and nothing else.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use coldspare_os::Capability;
use coldspare_scan::watch::Helper;

use crate::exit::{Code, Failure, Outcome};

/// The name of the hidden command.
pub(crate) const COMMAND: &str = "watch-helper";

/// A helper, and its end.
pub(super) struct HelperProcess {
    child: Child,
    pub(super) helper: Arc<Helper>,
}

impl HelperProcess {
    /// Starts the helper for `roots`, which are absolute and resolved.
    pub(super) fn start(roots: &[PathBuf]) -> std::io::Result<HelperProcess> {
        let (ours, its) = UnixStream::pair()?;
        let helper = Arc::new(Helper::new(ours)?);
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).args(roots).stdin(OwnedFd::from(its)).stdout(Stdio::null());
        Ok(HelperProcess { child: command.spawn()?, helper })
    }
}

impl Drop for HelperProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs as the helper; the daemon is at the other end of standard input.
pub(crate) fn run(roots: &[PathBuf]) -> Outcome {
    let daemon = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    // What can't be given up isn't held; what is missing is said when it is needed.
    let kept = coldspare_os::keep_capabilities(&[Capability::SysAdmin, Capability::DacReadSearch]);
    kept.map_err(|e| Failure::usage(format!("privileges can't be given up: {e}")))?;
    let link = std::io::stdin().as_fd().try_clone_to_owned().map_err(Failure::usage)?;
    coldspare_scan::watch::run_helper(roots, daemon, UnixStream::from(link)).map_err(Failure::usage)?;
    Ok(Code::Done)
}
