//! Seeds some of the home's own files between two daemons on this host, and so learns what a file and a byte cost here.
//!
//! Nothing of the home is written: the files are copied to a folder of the rehearsal, which is removed at its end.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::model::{Costs, Cpu};
use super::survey::{Amount, LARGE_BYTES, Samples};
use crate::demo::home::{git, make_dir, run};
use crate::demo::host::{Host, free_port, wait_until};
use crate::exit::Failure;

/// LIMIT: files that are copied for the cost of a file.
const SMALL_FILES: usize = 4_000;
/// LIMIT: bytes that are copied for the cost of a byte.
const LARGE_BYTES_MAX: u64 = 192 << 20;
/// LIMIT: bytes of packs of the repository that is repacked.
const REPACK_BYTES_MAX: u64 = 192 << 20;
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
struct Cost {
    amount: Amount,
    entries: u64,
    seconds: f64,
    active_cpu: f64,
    standby_cpu: f64,
    sent: f64,
    index_bytes: f64,
    manifest_bytes: f64,
}

/// Rehearses with files of the home, below `scratch`, which it makes and leaves empty.
///
/// # Errors
/// `Usage`: the folder can't be used, or the samples need more room than it has. `Differs`: a daemon failed.
pub(crate) fn rehearse(samples: &Samples, scratch: &Path) -> Result<Costs, Failure> {
    let (small, large) = (pick_small(samples), pick_large(samples));
    let (_, nothing) = seed(scratch, "empty", &[])?;
    let (rehearsal, of_small) = seed(scratch, "small", &small)?;
    let seconds_per_change = rehearsal.lone_change()?;
    drop(rehearsal);
    let (_, of_large) = seed(scratch, "large", &large)?;
    if of_small.amount.files + of_large.amount.files == 0 && !(small.is_empty() && large.is_empty()) {
        return Err(Failure::usage("none of the files that were tried can be read: run it as the user of the home"));
    }
    let sent_per_repacked_byte = repack(samples, scratch)?;
    let beyond = |cost: &Cost, of: fn(&Cost) -> f64| (cost.amount, of(cost) - of(&nothing));
    let per_unit = |of: fn(&Cost) -> f64| Costs::per_unit(beyond(&of_small, of), beyond(&of_large, of));
    let seconds = per_unit(|cost| cost.seconds);
    let bytes = (of_small.amount.bytes + of_large.amount.bytes).max(1);
    let per_entry = |of: fn(&Cost) -> f64| ((of(&of_small) - of(&nothing)) / of_small.entries.max(1) as f64).max(ROW_BYTES);
    Ok(Costs {
        seconds_base: nothing.seconds,
        seconds_per_file: seconds.file,
        seconds_per_byte: seconds.byte,
        active_cpu: Cpu { base: nothing.active_cpu, each: per_unit(|cost| cost.active_cpu) },
        standby_cpu: Cpu { base: nothing.standby_cpu, each: per_unit(|cost| cost.standby_cpu) },
        sent_per_byte: ((of_small.sent + of_large.sent - 2.0 * nothing.sent) / bytes as f64).max(0.0),
        index_bytes_per_entry: per_entry(|cost| cost.index_bytes),
        manifest_bytes_per_entry: per_entry(|cost| cost.manifest_bytes),
        seconds_per_change,
        sent_per_repacked_byte,
    })
}

/// A row takes no less, whatever the store's file grew by.
const ROW_BYTES: f64 = 100.0;

/// Where a copied file comes from, and its place below the root.
type Sample = (PathBuf, PathBuf);

fn pick_small(samples: &Samples) -> Vec<Sample> {
    let picked = samples.small.iter().take(SMALL_FILES).enumerate();
    picked.map(|(n, path)| (path.clone(), place_of(path, n))).collect()
}

/// Large files, packs with what belongs to them, up to the limit; at least one.
fn pick_large(samples: &Samples) -> Vec<Sample> {
    let (mut picked, mut bytes, mut repositories) = (Vec::new(), 0, BTreeMap::new());
    for (n, path) in samples.large.iter().enumerate() {
        let size = fs::metadata(path).map_or(0, |meta| meta.len());
        if bytes > 0 && bytes + size > LARGE_BYTES_MAX {
            continue;
        }
        bytes += size.min(LARGE_BYTES_MAX);
        // Of a larger one a part is taken, which is no pack.
        let place = match in_repository(path) {
            // Copies of a repository have packs of the same names: each repository stays one.
            Some((repository, below)) if size <= LARGE_BYTES_MAX => {
                let next = repositories.len();
                let number = *repositories.entry(repository).or_insert(next);
                Path::new("shared/data/repositories").join(format!("{number}")).join(below)
            }
            _ => format!("shared/data/parts/{n}").into(),
        };
        picked.push((path.clone(), place));
    }
    picked
}

/// Git's files stay git's, in a repository each thousand; all else becomes an attachment.
fn place_of(path: &Path, n: usize) -> PathBuf {
    match in_repository(path) {
        Some((_, below)) => Path::new(&format!("shared/data/repositories/{}", n / 1_000)).join(below),
        None => PathBuf::from(format!("shared/data/attachments/{}/{n}", n / 100)),
    }
}

/// The repository of a pack or of a loose object, and the path below it.
fn in_repository(path: &Path) -> Option<(&Path, PathBuf)> {
    let names: Vec<&str> = path.iter().rev().take(3).filter_map(|name| name.to_str()).collect();
    match names.as_slice() {
        [name, folder, "objects"] if *folder == "pack" || folder.len() == 2 => {
            Some((path.ancestors().nth(3)?, Path::new("objects").join(folder).join(name)))
        }
        _ => None,
    }
}

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
        let mut all = Vec::new();
        for n in 0..CHANGES {
            let path = self.active.files.home.join("shared").join(format!("changed{n}"));
            make_dir(&self.active.files.home.join("shared"))?;
            fs::write(&path, "changed\n").map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            all.push(self.active.checkpoint()?["seconds"].as_f64().unwrap_or_default());
        }
        all.sort_by(f64::total_cmp);
        Ok(all[CHANGES / 2])
    }

    fn sent(&self) -> f64 {
        self.active.status().and_then(|status| status["bytes_sent"].as_f64()).unwrap_or_default()
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        self.active.kill();
        self.standby.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn seed(scratch: &Path, name: &str, samples: &[Sample]) -> Result<(Rehearsal, Cost), Failure> {
    let mut rehearsal = Rehearsal::new(scratch, name)?;
    let mut amount = Amount::default();
    for (from, to) in samples {
        let to = rehearsal.active.files.home.join(to);
        if let Some(bytes) = copy(from, &to)? {
            amount = Amount { files: amount.files + 1, bytes: amount.bytes + bytes };
        }
    }
    complete_repositories(&rehearsal.active.files.home)?;
    let seconds = rehearsal.seed()?;
    let entries = rehearsal.standby.status().and_then(|status| status["entries"].as_u64()).unwrap_or_default();
    let cost = Cost {
        amount,
        entries,
        seconds,
        active_cpu: cpu_seconds(&rehearsal.active),
        standby_cpu: cpu_seconds(&rehearsal.standby),
        sent: rehearsal.sent(),
        index_bytes: bytes_below(&rehearsal.active.state()),
        manifest_bytes: bytes_below(&rehearsal.standby.state()),
    };
    Ok((rehearsal, cost))
}

/// Copies a file, or the beginning of a very large one, and with a pack its index; `None` when the home no longer has it.
fn copy(from: &Path, to: &Path) -> Result<Option<u64>, Failure> {
    make_dir(to.parent().unwrap_or(to))?;
    if from.extension().is_some_and(|end| end == "pack") {
        let _ = fs::copy(from.with_extension("idx"), to.with_extension("idx"));
    }
    let Ok(source) = fs::File::open(from) else { return Ok(None) };
    let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}; --scratch names another place", to.display()));
    let mut target = fs::File::create(to).map_err(fail)?;
    match std::io::copy(&mut source.take(LARGE_BYTES_MAX), &mut target) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::StorageFull => Err(fail(e)),
        Err(_) => Ok(None),
    }
}

/// Makes repositories of folders that have objects only.
fn complete_repositories(home: &Path) -> Result<(), Failure> {
    let Ok(entries) = fs::read_dir(home.join("shared/data/repositories")) else { return Ok(()) };
    for repository in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        make_dir(&repository.join("refs/heads"))?;
        let head = repository.join("HEAD");
        fs::write(&head, "ref: refs/heads/main\n").map_err(|e| Failure::usage(format!("{}: {e}", head.display())))?;
    }
    Ok(())
}

/// Bytes that travel a byte that `git repack -ad` writes; `None` when the home has no repository for it, or no git is there.
fn repack(samples: &Samples, scratch: &Path) -> Result<Option<f64>, Failure> {
    let fitting = samples.repositories.iter().filter(|(bytes, _)| (LARGE_BYTES..=REPACK_BYTES_MAX).contains(bytes));
    let Some((_, from)) = fitting.max() else { return Ok(None) };
    if run(std::process::Command::new("git").arg("--version")).is_err() {
        return Ok(None);
    }
    let mut rehearsal = Rehearsal::new(scratch, "repack")?;
    let repository = rehearsal.active.files.home.join("shared/data/repositories/1");
    for part in ["objects", "refs", "HEAD", "packed-refs"] {
        copy_all(&from.join(part), &repository.join(part))?;
    }
    rehearsal.seed()?;
    let (packs, before) = (repository.join("objects/pack"), rehearsal.sent());
    let old: Vec<_> = names(&packs);
    // A home in use may have been copied in the middle of something: then nothing is known.
    if git(&repository, &["repack", "-q", "-ad"]).is_err() {
        return Ok(None);
    }
    let new = names(&packs).into_iter().filter(|path| !old.contains(path));
    let written: u64 = new.filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len()).sum();
    rehearsal.active.checkpoint()?;
    Ok((written > 0).then(|| (rehearsal.sent() - before) / written as f64))
}

fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn copy_all(from: &Path, to: &Path) -> Result<(), Failure> {
    if !from.is_dir() {
        return copy(from, to).map(drop);
    }
    make_dir(to)?;
    names(from).iter().try_for_each(|path| copy_all(path, &to.join(path.file_name().unwrap_or_default())))
}

/// CPU seconds of a daemon so far, in steps of 10 ms.
fn cpu_seconds(host: &Host) -> f64 {
    let stat = host.pid().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok()).unwrap_or_default();
    // The name, in brackets, may have spaces; user and system time are the 12th and 13th of what follows.
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    fields.iter().sum::<u64>() as f64 / TICKS_PER_SECOND
}

/// As the kernel tells processes, on every architecture that is in use.
const TICKS_PER_SECOND: f64 = 100.0;

fn bytes_below(dir: &Path) -> f64 {
    use std::os::unix::fs::MetadataExt;
    let own = fs::symlink_metadata(dir).map_or(0, |meta| meta.blocks() * 512) as f64;
    own + names(dir)
        .iter()
        .map(|path| if path.is_dir() { bytes_below(path) } else { fs::symlink_metadata(path).map_or(0, |m| m.blocks() * 512) as f64 })
        .sum::<f64>()
}
