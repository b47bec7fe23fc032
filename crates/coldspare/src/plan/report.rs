//! The forecast for people: a table, and the lag of a day as a picture.

use std::fmt::Write as _;

use super::forecast::{Forecast, ModelError};
use super::limits::Limit;
use super::model::Day;
use super::speed::Speed;
use super::survey::{DAY, Survey};

/// What was found and what to expect of it.
pub(crate) fn page(survey: &Survey, speed: &Speed, limits: &[Limit], forecast: &Forecast, error: &ModelError) -> String {
    let mut out = String::new();
    let all = survey.files();
    let _ = writeln!(
        out,
        "home: {} entries, {} files, {}, {} repositories ({} forks); packs {}, loose objects {}, other {}; looked at in {:.1} s",
        survey.entries,
        all.files,
        amount(all.bytes as f64, "B"),
        survey.repositories,
        survey.forks,
        amount(survey.packs.bytes as f64, "B"),
        amount(survey.loose.bytes as f64, "B"),
        amount(survey.other.bytes as f64, "B"),
        survey.seconds
    );
    if survey.unreadable > 0 {
        let _ = writeln!(out, "{} entries could not be looked at: run it as the user of the home", survey.unreadable);
    }
    let _ = writeln!(out, "\n{:<52}{:>14}  rests on", "this host by itself", "");
    for line in speed.lines() {
        let _ = writeln!(out, "{line}");
    }
    let _ = writeln!(out, "\n{:<52}{:>14}  rests on", "what to expect", "");
    for figure in &forecast.figures {
        let value = figure.value.map_or("unknown".into(), |value| amount(value, figure.unit));
        let _ = writeln!(out, "{:<52}{value:>14}  {}", figure.what, figure.basis);
    }
    let _ = writeln!(
        out,
        "\n{:<16}{:>14}{:>20}{:>14}{:>14}{:>30}",
        "link", "seed", "night of a repack", "median lag", "highest lag", "lost by a failover at worst"
    );
    for day in &forecast.days {
        let [seed, night, median, highest] =
            [day.seed_seconds, day.repack_night_seconds, day.lag_median_seconds, day.lag_highest_seconds].map(|s| amount(s, "s"));
        let (link, lost) = (amount(day.bits_per_second, "bit/s"), amount(day.lag_highest_bytes, "B"));
        let _ = writeln!(out, "{link:<16}{seed:>14}{night:>20}{median:>14}{highest:>14}{lost:>30}");
    }
    let _ = writeln!(out, "\nThe error of these figures: ±{:.0} %, from {}.", error.share * 100.0, error.rests_on);
    let _ = writeln!(out, "\nkernel limits to raise on this host: {}", if limits.is_empty() { "none" } else { "" });
    for Limit { name, present, needed, why } in limits {
        let _ = writeln!(out, "{name} = {needed}, now {present}: {why}");
    }
    let _ = writeln!(
        out,
        "\nA failover without a handover loses what was written and isn't on the standby: the seconds of the lag at that moment, at worst \
        the highest of a day with the bytes that wait then; of a push with `coldspare checkpoint` behind it, nothing. A handover loses \
        nothing."
    );
    out
}

/// A value with its unit, in three digits.
pub(crate) fn amount(value: f64, unit: &str) -> String {
    if !value.is_finite() {
        return "none will do".into();
    }
    if unit == "s" {
        return match value {
            v if v < 1.0 => format!("{:.0} ms", v * 1e3),
            v if v < 600.0 => format!("{v:.1} s"),
            v if v < 2.0 * 3_600.0 => format!("{:.0} min", v / 60.0),
            v => format!("{:.1} h", v / 3_600.0),
        };
    }
    let steps = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (step, prefix) = steps.into_iter().find(|(step, _)| value >= *step).unwrap_or((1.0, ""));
    let short = value / step;
    let digits = if short >= 100.0 || step == 1.0 { 0 } else { 1 };
    format!("{short:.digits$} {prefix}{unit}")
}

/// The lag over the last day for each link, as an SVG picture with a logarithmic scale.
pub(crate) fn plot(days: &[Day]) -> String {
    let (width, height, left, top) = (860.0, 320.0, 70.0, 20.0);
    let (low, high) = (0.001f64, 100_000.0f64);
    let y = |seconds: f64| top + height * (1.0 - (seconds.clamp(low, high) / low).ln() / (high / low).ln());
    let x = |minute: usize| left + width * minute as f64 / DAY as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n",
        left + width + 150.0,
        top + height + 50.0
    );
    let _ = writeln!(out, "<title>Lag over the last day</title>\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>");
    for (seconds, name) in [
        (0.001, "1 ms"),
        (0.01, "10 ms"),
        (0.1, "100 ms"),
        (1.0, "1 s"),
        (10.0, "10 s"),
        (60.0, "1 min"),
        (600.0, "10 min"),
        (3_600.0, "1 h"),
        (36_000.0, "10 h"),
    ] {
        let at = y(seconds);
        let _ = writeln!(out, "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>", left + width);
        let _ = writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>", left - 6.0, at + 4.0);
    }
    for hours in (0..=24).step_by(4) {
        let at = x(hours * 60);
        let _ = writeln!(out, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} h</text>", top + height + 18.0, hours as i64 - 24);
    }
    for (n, day) in days.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let points: Vec<String> =
            day.lag_seconds.iter().enumerate().map(|(minute, lag)| format!("{:.1},{:.1}", x(minute), y(*lag))).collect();
        let _ = writeln!(out, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.2\" points=\"{}\"/>", points.join(" "));
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" fill=\"{colour}\">{}</text>",
            left + width + 10.0,
            top + 16.0 * (n + 1) as f64,
            amount(day.bits_per_second, "bit/s")
        );
    }
    out.push_str("</svg>\n");
    out
}

const COLOURS: [&str; 6] = ["#1b6ca8", "#c8553d", "#2e7d4f", "#7b4ea3", "#b8860b", "#555555"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        for (value, unit, expected) in [
            (0.0213, "s", "21 ms"),
            (12.34, "s", "12.3 s"),
            (1_800.0, "s", "30 min"),
            (90_000.0, "s", "25.0 h"),
            (1_536.0, "B", "1.5 kB"),
            (123.0, "B", "123 B"),
            (1e8, "bit/s", "100 Mbit/s"),
            (f64::INFINITY, "bit/s", "none will do"),
        ] {
            assert_eq!(amount(value, unit), expected);
        }
    }

    #[test]
    fn a_plot_has_a_line_a_link() {
        let day = |bits_per_second| Day {
            bits_per_second,
            seed_seconds: 1.0,
            repack_night_seconds: 1.0,
            lag_median_seconds: 0.02,
            lag_highest_seconds: 0.02,
            lag_highest_bytes: 0.0,
            lag_seconds: vec![0.02; DAY],
        };
        let svg = plot(&[day(1e8), day(1e9)]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("100 Mbit/s") && svg.contains("1.0 Gbit/s") && svg.ends_with("</svg>\n"));
    }
}
