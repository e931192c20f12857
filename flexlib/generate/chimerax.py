"""ChimeraX commands that play a series."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flexlib.render.chimerax import chimerax_text

_ROUNDS = 20  # to and fro of maps and atoms together, after those with labels
_CHIMERAX_INTERVAL = 4  # drawn frames per map while the labels are shown


def frame_ranges(table: pd.DataFrame) -> str:
    """The frames beyond the data as text such as ``1-3, 40`` (from 1)."""
    numbers = table.loc[table["beyond_data"] > 0, "frame"].to_numpy() + 1
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run))


def chimerax_script(name: str, table: pd.DataFrame, level: float, ensemble: str | None = None) -> str:
    """ChimeraX commands that open ``name``/*.mrc, beside the script, as one series and play it.

    First to and fro with a label for each frame, red where it is beyond the data; then without labels for ever, with a
    slider. ``table``: the series' rows of series.csv. ``ensemble``: the atoms' file, if any, which is opened as one
    trajectory and shows the same frame as the maps do; what plays without labels then ends after some rounds.
    """
    count = len(table)
    lines = [
        f"# {chimerax_text(name)}: {count} maps; the mesh's displacements are in *.vtu beside them (ParaView)",
        f"open {chimerax_text(f'{name}/frame_*.mrc')} vseries true",
        f"volume #1 style surface step 1 level {level:.6g}",
        "view",
    ]
    if ensemble is not None:
        lines += [
            f"open {chimerax_text(ensemble)} coordsets true",
            "hide #2 atoms",
            "show #2 cartoons",
            "color byattribute bfactor #2 palette blue:white:red",
            "transparency #1 60",
        ]
    if count == 1:
        return "\n".join(lines) + "\n"
    # one label a frame, hidden: perframe can change which is shown, but not what it says
    look = "xpos 0.03 ypos 0.04 size 20 visibility false"
    for row in table.itertuples():
        text, colour = f"frame {row.frame + 1} of {count}: {row.num_particles} particles near", "dim gray"
        if row.beyond_data:
            text, colour = f"{text} - BEYOND THE DATA", "red"
        lines.append(f'2dlabels create flex{row.frame + 1} text "{text}" color "{colour}" {look}')
    for end in (0, count + 1):
        lines.append(f'2dlabels create flex{end} text " " {look}')
    show = (
        '"vseries play #1 jumpTo $1; 2dlabels change flex$2 visibility false; 2dlabels change flex$3 visibility true"'
    )
    interval = _CHIMERAX_INTERVAL
    if ensemble is not None:
        show = show[:-1] + '; coordset #2 $3"'
    lines += [
        f"perframe {show} range 0,{count - 1} range 0,{count - 1} range 1,{count} interval {interval}",
        f"wait {count * interval + interval}",
        f"perframe {show} range {count - 1},0 range {count + 1},2 range {count},1 interval {interval}",
        f"wait {count * interval + interval}",
        "2dlabels change flex1 visibility false",
    ]
    if beyond := frame_ranges(table):
        text = f"beyond the data: frames {beyond}"
        lines.append(f'2dlabels create flexbeyond text "{text}" color red xpos 0.03 ypos 0.04 size 20')
    lines.append("vseries slider #1")
    if ensemble is None:
        lines.append("vseries play #1 direction oscillate loop true maxFrameRate 15")
    else:
        lines.append("coordset slider #2")
        there, back = (
            f'perframe "vseries play #1 jumpTo $1; coordset #2 $2" range {maps} range {models} interval {interval}'
            for maps, models in ((f"0,{count - 1}", f"1,{count}"), (f"{count - 1},0", f"{count},1"))
        )
        lines += [there, f"wait {count * interval}", back, f"wait {count * interval}"] * _ROUNDS
    return "\n".join(lines) + "\n"
