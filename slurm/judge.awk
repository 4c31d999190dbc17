# Reads what slurm/node.sh said on every node: "fact HOST NAME VALUE" and "error HOST first|after MESSAGE", with tabs between.
# Prints what is wrong, by host, and ends with 1; or prints in what the nodes agree.   usage: awk -f judge.awk -v hosts="a b c" FILE
BEGIN { FS = "\t"; num_hosts = split(hosts, host, " ") }
$1 == "fact" {
    heard[$2] = 1
    if (!($3 in num_values)) names[++num_names] = $3
    if (($3, $4) in where) where[$3, $4] = where[$3, $4] ", " $2
    else { where[$3, $4] = $2; value[$3, ++num_values[$3]] = $4 }
}
$1 == "error" {
    heard[$2] = 1
    if ($4 in said_by) said_by[$4] = said_by[$4] ", " $2
    else { said_by[$4] = $2; errors[++num_errors] = $4; urgency[num_errors] = $3; num_first += $3 == "first" }
}
function complain(text) { print "error: " text > "/dev/stderr"; complaints++ }
END {
    # what may only follow from another node's mistake is not said beside it
    for (i = 1; i <= num_errors; i++) if (urgency[i] == "first" || !num_first) complain(said_by[errors[i]] ": " errors[i])
    for (i = 1; i <= num_hosts; i++) if (!(host[i] in heard)) complain(host[i] ": gave no answer. What it wrote stands above.")
    agreed = ""
    for (i = 1; i <= num_names; i++) {
        name = names[i]
        text = ""
        for (j = 1; j <= num_values[name]; j++) {
            hosts_alike = where[name, value[name, j]]
            text = text "; " value[name, j] " on " hosts_alike
            if (name == "machine" && hosts_alike ~ /, /)
                complain(hosts_alike ": are one machine by several names. Leave all but one out, or say ONE_MACHINE=yes.")
        }
        if (name == "machine") continue # must differ, and is of no interest
        if (num_values[name] > 1 && name != "commit") complain(name " differs between nodes: " substr(text, 3) ". Make it the same on all.")
        if (value[name, 1] != "") agreed = agreed ", " name " " value[name, 1]
    }
    if (complaints) exit 1
    print num_hosts (num_hosts > 1 ? " nodes agree: " : " node: ") substr(agreed, 3)
}
