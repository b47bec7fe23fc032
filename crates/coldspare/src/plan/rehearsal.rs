//! Seeds some of the home's own files between two daemons on this host, and so learns what a file and a byte cost here.
//!
//! Nothing of the home is written: the files are copied to a folder of the rehearsal, which is removed at its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::model::{Costs, Cpu, MeasuredLink};
use super::samples::{Sample, copy_repository, copy_samples, fitting_repository, names, pick_large, pick_small, written_by_repack};
use super::survey::{Amount, Samples};
use crate::demo::home::make_dir;
use crate::demo::host::{Host, free_port, wait_until};
use crate::exit::Failure;

/// Lone changes that are timed.
const CHANGES: usize = 9;

/// Two daemons with roots of their own.
struct Rehearsal {
    active: Host,
    standby: Host,
    dir: PathBuf,
}

/// What one seed cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    pub(super) amount: Amount,
    pub(super) entries: u64,
    pub(super) seconds: f64,
    pub(super) active_cpu: f64,
    pub(super) sent: f64,
    pub(super) index_bytes: f64,
    /// Where the standby is a process of this host.
    pub(super) standby: Option<StandbyCost>,
}

/// What a seed cost the standby.
#[derive(Debug, Clone, Copy)]
pub(super) struct StandbyCost {
    pub(super) cpu: f64,
    pub(super) manifest_bytes: f64,
}

/// The seeds of a rehearsal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Phases {
    pub(super) nothing: Cost,
    pub(super) small: Cost,
    pub(super) large: Cost,
}

/// What changes cost after the seed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes {
    pub(super) seconds_per_change: f64,
    pub(super) sent_per_repacked_byte: Option<f64>,
}

/// Rehearses with files of the home, below `scratch`, which it makes and leaves empty.
///
/// # Errors
/// `Usage`: the folder can't be used, or the samples need more room than it has. `Differs`: a daemon failed.
pub(crate) fn rehearse(samples: &Samples, scratch: &Path) -> Result<Costs, Failure> {
    let (_, nothing) = seed(scratch, "empty", &[])?;
    let (rehearsal, small) = seed(scratch, "small", &pick_small(samples))?;
    let seconds_per_change = rehearsal.lone_change()?;
    drop(rehearsal);
    let (_, large) = seed(scratch, "large", &pick_large(samples))?;
    let phases = Phases { nothing, small, large };
    phases.check(samples)?;
    let sent_per_repacked_byte = repack(samples, scratch)?;
    Ok(phases.costs(Changes { seconds_per_change, sent_per_repacked_byte }, None))
}

impl Phases {
    /// # Errors
    /// `Usage`: there are files, and none could be read.
    pub(super) fn check(&self, samples: &Samples) -> Result<(), Failure> {
        let is_nothing = self.small.amount.files + self.large.amount.files == 0;
        if is_nothing && !(samples.small.is_empty() && samples.large.is_empty()) {
            return Err(Failure::usage("none of the files that were tried can be read: run it as the user of the home"));
        }
        Ok(())
    }

    /// Takes the cost of a file and of a byte apart.
    pub(super) fn costs(&self, changes: Changes, link: Option<MeasuredLink>) -> Costs {
        let Phases { nothing, small, large } = self;
        let per_unit = |of: &dyn Fn(&Cost) -> f64| {
            let beyond = |cost: &Cost| (cost.amount, of(cost) - of(nothing));
            Costs::per_unit(beyond(small), beyond(large))
        };
        let per_entry = |grown: f64| (grown / small.entries.max(1) as f64).max(ROW_BYTES);
        let seconds = per_unit(&|cost| cost.seconds);
        let bytes = (small.amount.bytes + large.amount.bytes).max(1);
        let manifest = |cost: &Cost| cost.standby.map(|standby| standby.manifest_bytes);
        Costs {
            seconds_base: nothing.seconds,
            seconds_per_file: seconds.file,
            seconds_per_byte: seconds.byte,
            active_cpu: Cpu { base: nothing.active_cpu, each: per_unit(&|cost| cost.active_cpu) },
            standby_cpu: nothing
                .standby
                .map(|standby| Cpu { base: standby.cpu, each: per_unit(&|cost| cost.standby.map_or(0.0, |standby| standby.cpu)) }),
            sent_per_byte: ((small.sent + large.sent - 2.0 * nothing.sent) / bytes as f64).max(0.0),
            index_bytes_per_entry: per_entry(small.index_bytes - nothing.index_bytes),
            manifest_bytes_per_entry: manifest(small).zip(manifest(nothing)).map(|(small, nothing)| per_entry(small - nothing)),
            seconds_per_change: changes.seconds_per_change,
            sent_per_repacked_byte: changes.sent_per_repacked_byte,
            link,
        }
    }
}

/// A row takes no less, whatever the store's file grew by.
const ROW_BYTES: f64 = 100.0;

impl Rehearsal {
    fn new(scratch: &Path, name: &str) -> Result<Rehearsal, Failure> {
        let dir = scratch.join(name);
        make_dir(&dir)?;
        let (active, standby) = (Host::new(&dir, "active", "send")?, Host::new(&dir, "standby", "receive")?);
        Ok(Rehearsal { active, standby, dir })
    }

    /// Starts both, until the standby has everything; seconds from the start of the active on.
    fn seed(&mut self) -> Result<f64, Failure> {
        let invitation = self.standby.init("standby", &["--listen", &format!("127.0.0.1:{}", free_port()?)])?;
        self.active.init("active", &["--invite", invitation.trim()])?;
        self.standby.start()?;
        let started = Instant::now();
        self.active.start()?;
        wait_until("the daemons are connected", || Ok(self.active.status().is_some_and(|s| s["connected"] == true)))?;
        self.active.checkpoint()?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// The median time until a small file is durable on the standby, in seconds.
    fn lone_change(&self) -> Result<f64, Failure> {
        lone_changes(&self.active.files.home, || Ok(self.active.checkpoint()?["seconds"].as_f64().unwrap_or_default()))
    }

    fn sent(&self) -> f64 {
        sent(&self.active)
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        self.active.kill();
        self.standby.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Writes small files into `home`, one after the other; the median of what `wait` says it took, in seconds.
pub(super) fn lone_changes(home: &Path, mut wait: impl FnMut() -> Result<f64, Failure>) -> Result<f64, Failure> {
    let dir = home.join("shared");
    make_dir(&dir)?;
    let mut all = Vec::new();
    for n in 0..CHANGES {
        let path = dir.join(format!("changed{n}"));
        fs::write(&path, "changed\n").map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
        all.push(wait()?);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[CHANGES / 2])
}

fn seed(scratch: &Path, name: &str, samples: &[Sample]) -> Result<(Rehearsal, Cost), Failure> {
    let mut rehearsal = Rehearsal::new(scratch, name)?;
    let amount = copy_samples(samples, &rehearsal.active.files.home)?;
    let seconds = rehearsal.seed()?;
    let entries = rehearsal.standby.status().and_then(|status| status["entries"].as_u64()).unwrap_or_default();
    let cost = Cost {
        amount,
        entries,
        seconds,
        active_cpu: cpu_seconds(&rehearsal.active),
        sent: rehearsal.sent(),
        index_bytes: bytes_below(&rehearsal.active.state()),
        standby: Some(StandbyCost { cpu: cpu_seconds(&rehearsal.standby), manifest_bytes: bytes_below(&rehearsal.standby.state()) }),
    };
    Ok((rehearsal, cost))
}

/// Bytes that travel a byte that `git repack -ad` writes; `None` when the home has no repository for it, or no git is there.
fn repack(samples: &Samples, scratch: &Path) -> Result<Option<f64>, Failure> {
    let Some(from) = fitting_repository(samples) else { return Ok(None) };
    let mut rehearsal = Rehearsal::new(scratch, "repack")?;
    let repository = rehearsal.active.files.home.join("shared/data/repositories/1");
    copy_repository(from, &repository)?;
    rehearsal.seed()?;
    let before = rehearsal.sent();
    let Some(written) = written_by_repack(&repository).filter(|bytes| *bytes > 0) else { return Ok(None) };
    rehearsal.active.checkpoint()?;
    Ok(Some((rehearsal.sent() - before) / written as f64))
}

/// Bytes that a daemon sent since it started.
pub(super) fn sent(active: &Host) -> f64 {
    active.status().and_then(|status| status["bytes_sent"].as_f64()).unwrap_or_default()
}

/// CPU seconds of a daemon so far, in steps of 10 ms.
pub(super) fn cpu_seconds(host: &Host) -> f64 {
    let stat = host.pid().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok()).unwrap_or_default();
    // The name, in brackets, may have spaces; user and system time are the 12th and 13th of what follows.
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    fields.iter().sum::<u64>() as f64 / TICKS_PER_SECOND
}

/// As the kernel tells processes, on every architecture that is in use.
const TICKS_PER_SECOND: f64 = 100.0;

/// Bytes of disk that a folder takes.
pub(super) fn bytes_below(dir: &Path) -> f64 {
    use std::os::unix::fs::MetadataExt;
    let own = fs::symlink_metadata(dir).map_or(0, |meta| meta.blocks() * 512) as f64;
    own + names(dir)
        .iter()
        .map(|path| if path.is_dir() { bytes_below(path) } else { fs::symlink_metadata(path).map_or(0, |m| m.blocks() * 512) as f64 })
        .sum::<f64>()
}
