"""The words that prompts are made of: common, short, one token each in most vocabularies."""

_LISTING = """
able above across add afternoon again age agree air allow almost alone along already always among angle
animal answer apple arm arrive art ask autumn away baby back bag ball bank base basket beach bear
beautiful bed before begin behind believe bell below best better between big bird black blood blow blue
board boat body bone book border bottle bottom box boy branch bread break bridge bright bring broad
brother brown build building burn business busy butter buy cake call camp candle capital card care carry
castle catch cause center chair chance change cheap cheese child choose church circle city class clean
clear climb clock close cloth cloud coast coat coffee cold color come common complete control cook copper
copy corn corner cost cotton count country course cover cow cross crowd cry cup current curve cut dance
danger dark daughter day deal deep deliver desert design desk detail direct discover distance doctor door
doubt draw dream dress drink drive drop dry dust early earth east easy eat edge education egg eight empty
end engine enough enter equal evening event every example exchange eye face fall family famous farm
farmer fast father feather field fight fill final find finger finish fire first fish flag flat floor
flour flow flower fly follow food foot force forest form forward four free fresh friend front fruit full
garden gather gentle gift girl give glass gold good grain grass gray great green ground group grow guess
guide hair half hall hand happy harbor hard harvest hat head hear heart heat heavy height help high hill
history hold hole home honest hope horse hospital hot hotel hour house hundred hunt ice idea inside iron
island join journey judge jump keep kettle key kind king kitchen knife know ladder lake lamp land
language large last late laugh law lead leaf learn leather leave left letter level library lift light
line lion list listen little long look loud love low lunch machine main make many map march mark market
master matter meal measure meat meet member metal middle mile milk mind minute mirror money month moon
morning mother mountain mouth move much music narrow nation near neck needle new night noise noon north
note number ocean offer office often oil old open orange order other owner page paint pair paper parent
park part party pass past path pay peace pen pencil people pepper person piano picture piece place plain
plan plant plate play pocket poem point pond poor
"""

WORDS = tuple(_LISTING.split())
