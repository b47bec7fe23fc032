//! What this host does by itself: looks at entries, reads, hashes, syncs, creates. A second or less each.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::report::amount;
use super::survey::Survey;
use crate::demo::home::make_dir;
use crate::exit::Failure;

/// How long each measurement may take.
const LIMIT: Duration = Duration::from_secs(1);
/// LIMIT: bytes of the home that are read.
const READ_BYTES_MAX: u64 = 256 << 20;
/// LIMIT: syncs.
const SYNCS_MAX: usize = 200;
/// LIMIT: files that are created.
const FILES_MAX: u32 = 10_000;
/// Bytes that are read or hashed at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Bytes of a small file.
const SMALL_BYTES: usize = 4 << 10;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Speed {
    /// Entries a second that the survey looked at.
    pub(crate) scan_entries_per_second: f64,
    /// Of files of the home, as they lay, on disk or in memory; `None` when none can be read.
    pub(crate) read_bytes_per_second: Option<f64>,
    /// BLAKE3 on all cores.
    pub(crate) hash_bytes_per_second: f64,
    /// The median sync of 4 KiB in the scratch folder.
    pub(crate) fsync_seconds: f64,
    /// Files of 4 KiB in the scratch folder, without a sync.
    pub(crate) create_files_per_second: f64,
}

/// Measures, with the home's own files, and in `scratch`.
///
/// # Errors
/// `Usage`: the scratch folder can't be used.
pub(crate) fn measure(survey: &Survey, scratch: &Path) -> Result<Speed, Failure> {
    let dir = scratch.join("speed");
    make_dir(&dir)?;
    let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}; --scratch names another place", dir.display()));
    let (fsync_seconds, create_files_per_second) = (sync(&dir).map_err(fail)?, create(&dir).map_err(fail)?);
    fs::remove_dir_all(&dir).map_err(fail)?;
    Ok(Speed {
        scan_entries_per_second: survey.entries as f64 / survey.seconds.max(f64::MIN_POSITIVE),
        read_bytes_per_second: read(survey.samples.large.iter().chain(&survey.samples.small)),
        hash_bytes_per_second: hash(),
        fsync_seconds,
        create_files_per_second,
    })
}

impl Speed {
    /// For people, a line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |what: &str, value: String, basis: &str| format!("{what:<52}{value:>14}  {basis}");
        let a_second = |value: f64| format!("{}/s", amount(value, "B"));
        let read = self.read_bytes_per_second.map_or("none readable".into(), a_second);
        vec![
            line("scan, entries a second", format!("{:.0}", self.scan_entries_per_second), "the survey, on all cores"),
            line("read", read, "files of this home as they lay, on disk or in memory, one at a time"),
            line("hash", a_second(self.hash_bytes_per_second), "BLAKE3 of what is in memory, on all cores"),
            line("fsync", format!("{:.2} ms", self.fsync_seconds * 1e3), "median, of 4 KiB in the scratch folder"),
            line(
                "create, files a second",
                format!("{:.0}", self.create_files_per_second),
                "of 4 KiB in the scratch folder, without a sync",
            ),
        ]
    }
}

fn read<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Option<f64> {
    let (started, mut bytes, mut block) = (Instant::now(), 0, vec![0; BLOCK_BYTES]);
    'all: for path in paths {
        let Ok(mut file) = File::open(path) else { continue };
        while let Ok(len @ 1..) = file.read(&mut block) {
            bytes += len as u64;
            if started.elapsed() >= LIMIT || bytes >= READ_BYTES_MAX {
                break 'all;
            }
        }
    }
    (bytes > 0).then(|| bytes as f64 / started.elapsed().as_secs_f64())
}

fn hash() -> f64 {
    let (started, block) = (Instant::now(), vec![7; BLOCK_BYTES]);
    let blocks = rayon::broadcast(|_| {
        let mut blocks = 0u64;
        while started.elapsed() < LIMIT / 2 {
            black_box(coldspare_delta::digest(black_box(&block)));
            blocks += 1;
        }
        blocks
    });
    (blocks.iter().sum::<u64>() * BLOCK_BYTES as u64) as f64 / started.elapsed().as_secs_f64()
}

fn sync(dir: &Path) -> std::io::Result<f64> {
    let (file, started, mut all) = (File::create(dir.join("synced"))?, Instant::now(), Vec::new());
    while all.is_empty() || (all.len() < SYNCS_MAX && started.elapsed() < LIMIT) {
        file.write_all_at(&[all.len() as u8; SMALL_BYTES], 0)?;
        let before = Instant::now();
        file.sync_all()?;
        all.push(before.elapsed().as_secs_f64());
    }
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

fn create(dir: &Path) -> std::io::Result<f64> {
    let (started, mut files) = (Instant::now(), 0);
    while files == 0 || (files < FILES_MAX && started.elapsed() < LIMIT) {
        fs::write(dir.join(files.to_string()), [7; SMALL_BYTES])?;
        files += 1;
    }
    Ok(f64::from(files) / started.elapsed().as_secs_f64())
}
