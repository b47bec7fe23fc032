//! Costs over sizes as an SVG picture, both logarithmic, each cost by its multiple of the first.

use std::fmt::Write as _;

/// One cost.
pub(crate) struct Line<'a> {
    pub(crate) name: &'a str,
    /// One for each size.
    pub(crate) values: &'a [f64],
}

/// Draws the lines; a dashed one is what is in proportion to the size.
pub(crate) fn draw(sizes: &[f64], lines: &[Line<'_>]) -> String {
    let (first, last) = (sizes[0], sizes[sizes.len() - 1]);
    let high = (last / first).log10().max(f64::EPSILON);
    // From a third to what is in proportion, and a little more.
    let (y_low, y_high) = (-0.5, high + 0.3);
    let x = |size: f64| LEFT + WIDTH * (size / first).log10() / high;
    let y = |multiple: f64| TOP + HEIGHT * (1.0 - (multiple.log10().clamp(y_low, y_high) - y_low) / (y_high - y_low));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n",
        LEFT + WIDTH + LEGEND,
        TOP + HEIGHT + 50.0
    );
    let _ =
        writeln!(out, "<title>Growth of costs with the entries of a home</title>\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>");
    for power in 0..=y_high.floor() as i32 {
        let (multiple, at) = (10f64.powi(power), y(10f64.powi(power)));
        let _ = writeln!(out, "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>", LEFT + WIDTH);
        let _ = writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">× {multiple}</text>", LEFT - 6.0, at + 4.0);
    }
    for size in sizes {
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{size}</text>", x(*size), TOP + HEIGHT + 18.0);
    }
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#888\" stroke-dasharray=\"6 4\"/>",
        x(first),
        y(1.0),
        x(last),
        y(last / first)
    );
    for (no, line) in lines.iter().enumerate() {
        let colour = format!("hsl({} 65% 40%)", no * 360 / lines.len());
        let base = line.values.iter().copied().find(|value| *value > 0.0).unwrap_or(1.0);
        let points: Vec<String> =
            sizes.iter().zip(line.values).map(|(size, value)| format!("{:.1},{:.1}", x(*size), y((value / base).max(1e-9)))).collect();
        let dashes = ["", "7 3", "2 3"][no % 3];
        let stroke = format!("stroke=\"{colour}\" stroke-width=\"1.5\" stroke-dasharray=\"{dashes}\"");
        let (from, at) = (LEFT + WIDTH + 15.0, TOP + 18.0 * (no + 1) as f64);
        let _ = writeln!(out, "<polyline fill=\"none\" {stroke} points=\"{}\"/>", points.join(" "));
        let _ = writeln!(out, "<line x1=\"{from}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" {stroke}/>", from + 25.0);
        let _ = writeln!(out, "<text x=\"{}\" y=\"{}\">{}</text>", from + 32.0, at + 4.0, line.name);
    }
    out.push_str("</svg>\n");
    out
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 20.0;
const LEGEND: f64 = 320.0;
