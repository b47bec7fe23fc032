//! The watch of either role: the best that is to be had, and its helper, which is this program once more, as a process that
//! has the privileges of fanotify and nothing else.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use coldspare_core::ClusterId;
use coldspare_os::Capability;
use coldspare_scan::watch::{Backend, Helper, Told, Watch, WatchedRoot};

use crate::config::{Config, WatchMode};
use crate::exit::{Code, Failure, Outcome};
use crate::roots;

/// The name of the hidden command.
pub(crate) const COMMAND: &str = "watch-helper";

/// The flag by which it is asked who did something.
pub(crate) const PROCESSES: &str = "--processes";

/// A helper, and its end.
pub(crate) struct HelperProcess {
    child: Child,
    helper: Arc<Helper>,
}

impl HelperProcess {
    /// Starts the helper for `roots`, which are absolute and resolved.
    ///
    /// # Errors
    /// When no process or thread can be started.
    pub(crate) fn start(roots: &[PathBuf], told: Told) -> std::io::Result<HelperProcess> {
        let (ours, its) = UnixStream::pair()?;
        let helper = Arc::new(Helper::new(ours)?);
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).args((told == Told::Processes).then_some(PROCESSES)).args(roots);
        command.stdin(OwnedFd::from(its)).stdout(Stdio::null());
        Ok(HelperProcess { child: command.spawn()?, helper })
    }

    /// What a watch asks it through.
    pub(crate) fn helper(&self) -> Arc<Helper> {
        self.helper.clone()
    }
}

impl Drop for HelperProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs as the helper; the daemon is at the other end of standard input.
///
/// # Errors
/// `Usage`: privileges that can't be given up, a broken link.
pub(crate) fn run(roots: &[PathBuf], told: Told) -> Outcome {
    let daemon = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    // What can't be given up isn't held; what is missing is said when it is needed.
    let kept = coldspare_os::keep_capabilities(&[Capability::SysAdmin, Capability::DacReadSearch]);
    kept.map_err(|e| Failure::usage(format!("privileges can't be given up: {e}")))?;
    let link = std::io::stdin().as_fd().try_clone_to_owned().map_err(Failure::usage)?;
    coldspare_scan::watch::run_helper(roots, daemon, told, UnixStream::from(link)).map_err(Failure::usage)?;
    Ok(Code::Done)
}

/// Starts the helper of fanotify where that is wanted, and gives its privilege up, for this thread and those that it starts;
/// or says why there is none.
///
/// # Errors
/// `Usage` for roots that can't be used.
pub(crate) fn start_helper(
    config: &Config,
    cluster: ClusterId,
    wanted: WatchMode,
    told: Told,
) -> Result<Result<HelperProcess, String>, Failure> {
    if !matches!(wanted, WatchMode::Auto | WatchMode::Fanotify) {
        return Ok(Err("it is not asked for".into()));
    }
    let roots = roots::resolve(config, cluster)?;
    let helper = HelperProcess::start(&roots, told).map_err(|e| format!("its helper can't be started: {e}"));
    // What talks to the network has no need of it.
    coldspare_os::give_up_capability(Capability::SysAdmin).map_err(Failure::usage)?;
    Ok(helper)
}

/// The watch that is wanted, or the best that is to be had, with why it is none better. `wake` must not block.
///
/// # Errors
/// `Usage`: a root can't be used, or the watch that is insisted on isn't to be had.
pub(crate) fn open_watch(
    wanted: WatchMode,
    roots: &[WatchedRoot],
    wake: impl Fn() + Clone + Send + Sync + 'static,
    helper: &Result<HelperProcess, String>,
) -> Result<(Option<Watch>, Option<String>), Failure> {
    if wanted == WatchMode::Scan {
        return Ok((None, None));
    }
    for root in roots {
        let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}", root.path.display()));
        coldspare_scan::watch::make_cookie_dir(&root.path).map_err(fail)?;
        if let Some(kind) = coldspare_os::network_filesystem(&root.path).map_err(fail)?.filter(|_| wanted == WatchMode::Auto) {
            let why = format!("{} is on {kind}: other hosts' changes cause no event", root.path.display());
            tracing::warn!(why, "no watch: changes are found by scans only");
            return Ok((None, Some(why)));
        }
    }
    let start = |backend| Watch::start(backend, roots.to_vec(), Box::new(wake.clone())).map_err(|e| e.to_string());
    let by_fanotify = || {
        let process = helper.as_ref().map_err(|why| format!("fanotify: {why}"))?;
        start(Backend::Fanotify(process.helper.clone()))
    };
    match wanted {
        WatchMode::Fanotify => Ok((Some(by_fanotify().map_err(Failure::usage)?), None)),
        WatchMode::Inotify => Ok((Some(start(Backend::Inotify).map_err(Failure::usage)?), None)),
        WatchMode::Auto | WatchMode::Scan => {
            let why = match by_fanotify() {
                Ok(watch) => return Ok((Some(watch), None)),
                Err(why) => why,
            };
            tracing::info!(why, "inotify is used");
            match start(Backend::Inotify) {
                Ok(watch) => Ok((Some(watch), Some(why))),
                Err(worse) => {
                    tracing::warn!(why = worse, "no watch: changes are found by scans only");
                    Ok((None, Some(format!("{why}; {worse}"))))
                }
            }
        }
    }
}
