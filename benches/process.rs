//! Processes and what they cost, from `/proc`: no privileges, nothing to install.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// What a command took, of itself and of the daemon that served it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cost {
    /// From its start to its end.
    pub(crate) seconds: f64,
    /// User and system time of the command with its children.
    pub(crate) client_cpu_seconds: f64,
    /// The same of the daemon, for the time that the command ran.
    pub(crate) daemon_cpu_seconds: f64,
    /// The largest resident set of any one process on the command's side.
    pub(crate) client_peak_bytes: u64,
    /// The same on the daemon's side.
    pub(crate) daemon_peak_bytes: u64,
    /// What the command wrote to its standard output.
    pub(crate) stdout: String,
}

/// A daemon that is stopped when dropped.
pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts a daemon that writes to `log`, and waits for `is_ready`.
    pub(crate) fn start(command: &mut Command, log: &Path, is_ready: impl Fn() -> bool) -> io::Result<Daemon> {
        let file = File::create(log)?;
        let mut child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_ready() {
            if child.try_wait()?.is_some() || Instant::now() > deadline {
                return Err(io::Error::other(format!("{command:?} is not ready; its log: {}", fs::read_to_string(log)?)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Daemon { child })
    }
}

impl Daemon {
    /// User and system time until now, of the daemon and of all below it.
    pub(crate) fn cpu_seconds(&self) -> io::Result<f64> {
        let below: io::Result<Vec<f64>> = children(self.child.id()).into_iter().map(cpu_seconds).collect();
        Ok(cpu_seconds(self.child.id())? + below?.into_iter().sum::<f64>())
    }

    /// What of the daemon and of all below it is in memory.
    pub(crate) fn resident_bytes(&self) -> u64 {
        children(self.child.id()).into_iter().chain([self.child.id()]).map(|pid| status_bytes(pid, "VmRSS:")).sum()
    }

    /// What the daemon has caused to be written to disks until now.
    pub(crate) fn written_bytes(&self) -> io::Result<u64> {
        let counts = fs::read_to_string(format!("/proc/{}/io", self.child.id()))?;
        let written = counts.lines().find_map(|line| line.strip_prefix("write_bytes:")?.trim().parse().ok());
        written.ok_or_else(|| io::Error::other("the kernel doesn't count what a process writes"))
    }

    /// The high-water mark of the daemon.
    pub(crate) fn peak_bytes(&self) -> u64 {
        status_bytes(self.child.id(), "VmHWM:")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// Runs a command that `daemon` serves.
///
/// Peak memory is the kernel's high-water mark, read every 20 ms: growth in a process's last 20 ms is missed.
pub(crate) fn measure(command: &mut Command, daemon: &Daemon) -> io::Result<Cost> {
    let served_by = daemon.child.id();
    let (cpu_before, children_before) = (cpu_seconds(served_by)?, children(served_by));
    let start = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let client = child.id();
    let is_over = AtomicBool::new(false);
    let peaks = Mutex::new((BTreeMap::new(), BTreeMap::new()));
    let (seconds, waited) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                if let Ok(mut peaks) = peaks.lock() {
                    sample(client, &mut peaks.0);
                    sample(served_by, &mut peaks.1);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // Not reaped yet: its times can still be read.
        let waited = rustix::process::waitid(WaitId::Pid(Pid::from_child(&child)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let seconds = start.elapsed().as_secs_f64();
        is_over.store(true, Ordering::Relaxed);
        (seconds, waited)
    });
    waited?;
    let client_cpu_seconds = cpu_seconds(client)?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{command:?} failed: {}\n{text}", output.status)));
    }
    wait_for_children(served_by, &children_before);
    let (client_peaks, daemon_peaks) = peaks.into_inner().unwrap_or_default();
    Ok(Cost {
        seconds,
        client_cpu_seconds,
        daemon_cpu_seconds: cpu_seconds(served_by)? - cpu_before,
        client_peak_bytes: client_peaks.into_values().max().unwrap_or_default(),
        daemon_peak_bytes: daemon_peaks.into_values().max().unwrap_or_default(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
    })
}

/// User and system time of a process and of its children that it waited for.
fn cpu_seconds(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything; utime, stime, cutime and cstime are fields 14 to 17.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after_name.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / USER_HZ)
}

/// Notes the high-water mark of a process and of all below it.
fn sample(pid: u32, peaks: &mut BTreeMap<u32, u64>) {
    let peak = status_bytes(pid, "VmHWM:");
    if peak > 0 {
        peaks.insert(pid, peak);
    }
    for child in children(pid) {
        sample(child, peaks);
    }
}

/// A size in a process's status; 0 when the process is gone.
fn status_bytes(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Waits until a daemon's processes for one connection are gone, so that their times count; those in `before` stay.
fn wait_for_children(pid: u32, before: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while children(pid).iter().any(|child| !before.contains(child)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The ticks of `/proc/PID/stat` in a second: part of the kernel's interface, 100 wherever coldspare runs.
const USER_HZ: f64 = 100.0;

pub(crate) const MIB: f64 = (1 << 20) as f64;
