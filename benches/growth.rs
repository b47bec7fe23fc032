//! How each cost grows with the home: the same home in several sizes, each cost of each, and the exponent.
//!
//! An exponent of 1 is in proportion to the entries, of 0 independent of them: least squares over the logarithms.

use std::fs;
use std::path::Path;
use std::time::Instant;

use coldspare_sim::load::percentile;
use serde_json::{Value, json};

use crate::Settings;
use crate::follow::{GIVE_UP, pause, push_and_wait, pusher, wait_for};
use crate::home::{self, SEED};
use crate::pair::Pair;
use crate::plot::{self, Line};
use crate::process::{MIB, measure};
use crate::report::{Result, figure, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "growth";

/// Sizes, in entries.
const SIZES: [u64; 6] = [10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000];
/// Sizes in short.
pub(crate) const SMALL_SIZES: [u64; 2] = [3_000, 30_000];
/// A file that changes again and again, in a home that stays as it is else.
const CHANGED: &str = "shared/data/changed";
/// Changes of each kind before it is measured: the first ones still meet what the start left.
const WARM_UP: usize = 10;

/// Sizes up to the one that is asked for.
pub(crate) fn sizes_up_to(entries: u64) -> Vec<u64> {
    SIZES.into_iter().filter(|size| *size < entries).chain([entries]).collect()
}

/// One cost in each size.
struct Row {
    what: &'static str,
    values: Vec<f64>,
}

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let mut rows: Vec<Row> = Vec::new();
    for &entries in &settings.sizes {
        let start = Instant::now();
        for (no, (what, value)) in one(settings, entries)?.into_iter().enumerate() {
            match rows.get_mut(no) {
                Some(row) => row.values.push(value),
                None => rows.push(Row { what, values: vec![value] }),
            }
        }
        eprintln!("{entries} entries: {:.0} s", start.elapsed().as_secs_f64());
    }
    let sizes: Vec<f64> = settings.sizes.iter().map(|entries| *entries as f64).collect();
    print_table(&sizes, &rows);
    if let Some(path) = &settings.plot {
        let lines = rows.iter().map(|row| Line { name: row.what, values: &row.values });
        fs::write(path, plot::draw(&sizes, &lines.collect::<Vec<_>>()))?;
    }
    let rows: Vec<Value> =
        rows.iter().map(|row| json!({"what": row.what, "values": row.values, "exponent": exponent(&sizes, &row.values)})).collect();
    Ok(Some(json!({"home": SECTION, "entries": settings.sizes, "rows": rows})))
}

/// All costs of a home of so many entries.
fn one(settings: &Settings, entries: u64) -> Result<Vec<(&'static str, f64)>> {
    let dir = settings.lasting_dir(&format!("growth-{entries}"))?;
    let source = dir.join("home");
    fs::create_dir(&source)?;
    home::make_wide(&source, entries, SEED)?;
    let mut pusher = pusher(&dir, &source)?;
    let pair = Pair::make(&source, &dir)?;
    // A daemon for each: the high-water mark of one stays.
    let [seed, rescan] = [(); 2].map(|()| pair.receive().and_then(|receiver| Ok(measure(&mut pair.send_once(), &receiver)?)));
    let (seed, rescan) = (seed?, rescan?);
    let [index, manifest] = pair.state_bytes()?;

    let (receiver, sender) = (pair.receive()?, pair.send()?);
    run(&mut pair.on_active(&["checkpoint", "--timeout", "600s"]))?;
    let cpu = || -> Result<f64> { Ok(sender.cpu_seconds()? + receiver.cpu_seconds()?) };
    let written = || -> Result<u64> { Ok(sender.written_bytes()? + receiver.written_bytes()?) };
    let changes = |mut change: &mut dyn FnMut(usize) -> Result<f64>| -> Result<[f64; 3]> {
        (0..WARM_UP).map(&mut change).collect::<Result<Vec<f64>>>()?;
        let (cpu_before, written_before) = (cpu()?, written()?);
        let mut ms = (0..settings.changes).map(change).collect::<Result<Vec<f64>>>()?;
        ms.sort_by(f64::total_cmp);
        let each = |all: f64| all / settings.changes as f64;
        Ok([percentile(&ms, 50), each((cpu()? - cpu_before) * 1e3), each((written()? - written_before) as f64 / 1024.0)])
    };
    let [file_ms, file_cpu, file_written] = changes(&mut |no| change_file(&source, &pair.destination, no))?;
    let [push_ms, push_cpu, push_written] = changes(&mut |no| {
        std::thread::sleep(pause(no));
        push_and_wait(&mut pusher, &source, &pair.destination, GIVE_UP)
    })?;
    Ok(vec![
        ("seed, s", seed.seconds),
        ("seed, CPU of the active, s", seed.client_cpu_seconds),
        ("seed, CPU of the standby, s", seed.daemon_cpu_seconds),
        ("seed, peak memory of the active, MiB", seed.client_peak_bytes as f64 / MIB),
        ("seed, peak memory of the standby, MiB", seed.daemon_peak_bytes as f64 / MIB),
        ("index on disk, MiB", index as f64 / MIB),
        ("manifest on disk, MiB", manifest as f64 / MIB),
        ("rescan, nothing changed, s", rescan.seconds),
        ("rescan, CPU of both, s", rescan.client_cpu_seconds + rescan.daemon_cpu_seconds),
        ("rescan, peak memory of the active, MiB", rescan.client_peak_bytes as f64 / MIB),
        ("rescan, peak memory of the standby, MiB", rescan.daemon_peak_bytes as f64 / MIB),
        ("a file changed, ms", file_ms),
        ("a file changed, CPU of both, ms", file_cpu),
        ("a file changed, written by both, KiB", file_written),
        ("a push, ms", push_ms),
        ("a push, CPU of both, ms", push_cpu),
        ("a push, written by both, KiB", push_written),
    ])
}

/// Milliseconds until the new content of a file is on the standby.
fn change_file(home: &Path, destination: &Path, no: usize) -> Result<f64> {
    std::thread::sleep(pause(no));
    let content = format!("{no:08}\n").repeat(40);
    let start = Instant::now();
    fs::write(home.join(CHANGED), &content)?;
    wait_for(&destination.join(CHANGED), content.as_bytes(), GIVE_UP)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn print_table(sizes: &[f64], rows: &[Row]) {
    let heads: Vec<String> = sizes.iter().map(|size| format!("{size} |")).collect();
    println!("| entries | {} exponent |\n|---|{}---|", heads.join(" "), "---|".repeat(sizes.len()));
    for row in rows {
        let values: Vec<String> = row.values.iter().map(|value| format!("{} |", figure(*value))).collect();
        println!("| {} | {} {:.2} |", row.what, values.join(" "), exponent(sizes, &row.values));
    }
    println!();
}

/// The exponent with which `values` grow with `sizes`; not a number when fewer than two of them are above zero.
fn exponent(sizes: &[f64], values: &[f64]) -> f64 {
    let points: Vec<(f64, f64)> = sizes.iter().zip(values).filter(|(_, value)| **value > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = points.len() as f64;
    let (x_mean, y_mean) = (points.iter().map(|p| p.0).sum::<f64>() / count, points.iter().map(|p| p.1).sum::<f64>() / count);
    let together: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    together / points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum::<f64>()
}
